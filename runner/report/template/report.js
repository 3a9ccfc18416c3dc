"use strict";
// Words from specs, captions and logs are written into text nodes only, never into HTML.
(() => {
  const { runs, shots, compares } = JSON.parse(document.getElementById("data").textContent);
  const at = id => document.getElementById(id);
  const make = (tag, props, ...inside) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...inside);
    return node;
  };

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.previousElementSibling;
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {  // some browsers forbid this for pages opened from disk: select the text instead
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
  }
  for (const box of document.querySelectorAll("details")) {
    box.addEventListener("toggle", () => {
      for (const log of box.querySelectorAll(".log")) log.scrollTop = log.scrollHeight;  // show the end, which says why the run failed
    });
  }
  if (!runs.length) return;

  // ---- which runs are compared, and their colours -----------------------------------------------------------------

  const MOST = 12, BEST = 8;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const LIGHT = ["#2f6fde", "#e0731d", "#1b9e62", "#c9308f", "#8357e8", "#a97f00", "#0a97a8", "#d23b3b"];
  const DARK = ["#6ea8ff", "#ffa057", "#4cd694", "#ff7ac6", "#b69cff", "#e6c34a", "#45d0e0", "#ff7d7d"];
  const colour = place => {  // past the palette, hues a golden angle apart: neighbours always differ
    if (place < LIGHT.length) return (dark.matches ? DARK : LIGHT)[place];
    const hue = (place * 137.508 + 222) % 360;
    return `hsl(${hue.toFixed(1)} ${dark.matches ? 75 : 68}% ${dark.matches ? 66 : 42}%)`;
  };
  const places = new Map();  // run -> colour number, the same as long as the run is compared
  const chosen = new Set();
  const byLoss = indices => [...indices].sort((a, b) => (runs[a].loss ?? Infinity) - (runs[b].loss ?? Infinity));

  const choose = indices => {
    chosen.clear();
    places.clear();
    for (const index of indices) pick(index, true);
    draw();
  };
  const pick = (index, on) => {
    if (on) {
      const taken = new Set(places.values());
      let free = 0;
      while (taken.has(free)) free++;
      places.set(index, free);
      chosen.add(index);
    } else {
      places.delete(index);
      chosen.delete(index);
    }
  };

  // ---- the table --------------------------------------------------------------------------------------------------

  const body = document.querySelector("#table tbody");
  const rows = [...body.rows];
  const words = rows.map(row => {
    const keys = [...row.querySelectorAll("[data-key]")].map(cell => {
      const key = cell.dataset.key.toLowerCase(), value = cell.textContent.toLowerCase();
      return ` ${key}=${value} ${key.split(".").pop()}=${value} `;
    });
    return ` ${row.querySelector(".name a").title.toLowerCase()} ${row.dataset.state} ${keys.join("")}`;
  });
  const hiddenStates = new Set();

  const matches = (text, word) => (word.includes("=") ? text.includes(` ${word} `) : text.includes(word));
  const filter = () => {
    const wanted = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, index) => {
      row.hidden = hiddenStates.has(row.dataset.state) || !wanted.every(word => matches(words[index], word));
      count += !row.hidden;
    });
    at("count").textContent = count === rows.length ? "" : `${count} of ${rows.length}`;
    at("nothing").hidden = count > 0;
  };
  at("filter").addEventListener("input", filter);
  for (const toggle of document.querySelectorAll(".toggle")) {
    toggle.addEventListener("click", () => {
      const shown = toggle.getAttribute("aria-pressed") === "true";
      toggle.setAttribute("aria-pressed", !shown);
      hiddenStates[shown ? "add" : "delete"](toggle.dataset.state);
      filter();
    });
  }

  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const sort = (column, descending) => {
    const value = row => {
      const cell = row.cells[column];
      return cell.dataset.v !== undefined ? Number(cell.dataset.v) : cell.textContent.trim();
    };
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // unknown values come last in both directions
      const result = typeof x === "number" && typeof y === "number" ? x - y : compare(String(x), String(y));
      return descending ? -result : result;
    };
    body.append(...[...body.rows].sort(order));
    document.querySelectorAll("#table thead th").forEach((head, index) => {
      if (index === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  };
  document.querySelectorAll("#table thead th").forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => sort(column, head.ariaSort === "ascending"));
  });

  for (const key of ["eval", "pace", "wall", "memory"]) {
    const cells = [...body.querySelectorAll(`[data-col=${key}][data-v]`)];
    const values = cells.map(cell => Number(cell.dataset.v));
    const most = values.reduce((a, b) => Math.max(a, b), 0), least = values.reduce((a, b) => Math.min(a, b), Infinity);
    cells.forEach((cell, index) => {
      if (key === "eval") cell.classList.toggle("best", compares && values[index] === least && cells.length > 1);
      else if (most > 0 && cells.length > 1) {
        cell.dataset.p = "";
        cell.style.setProperty("--p", `${(100 * values[index]) / most}%`);
      }
    });
  }

  rows.forEach((row, index) => {
    row.querySelector("input").addEventListener("change", event => {
      pick(index, event.target.checked);
      draw();
    });
  });
  const listed = () => [...body.rows].filter(row => !row.hidden).map(row => Number(row.dataset.index));
  at("show-best").addEventListener("click", () => choose(byLoss(listed()).slice(0, BEST)));
  at("show-listed").addEventListener("click", () => choose(listed()));
  at("show-none").addEventListener("click", () => choose([]));

  // ---- pictures ---------------------------------------------------------------------------------------------------

  const select = at("shot");
  shots.forEach((shot, index) => {
    const text = `${shot.prompt} · seed ${shot.seed}`;
    select.append(make("option", { value: index, textContent: text, title: text }));
  });
  select.addEventListener("change", () => drawGrid());

  const drawGrid = () => {
    const shot = shots[select.value];
    at("pictures").hidden = !shots.length;
    if (!shot) return;
    const cells = shot.cells.filter(cell => chosen.has(cell[0]));
    const steps = [...new Set(cells.map(cell => cell[1]))].sort((a, b) => a - b);
    const head = make("tr", {}, make("th", {}));
    for (const step of steps) head.append(make("th", { textContent: step === 0 ? "base" : `step ${step}` }));
    const lines = [];
    for (const index of inOrder()) {
      const own = new Map(cells.filter(cell => cell[0] === index).map(cell => [cell[1], cell]));
      if (!own.size) continue;
      const run = runs[index];
      const title = make("th", { scope: "row" }, swatch(index), " ", run.label);
      if (run.loss !== null) title.append(make("small", { textContent: `eval ${run.loss.toFixed(4)}` }));
      const line = make("tr", {}, title);
      for (const step of steps) {
        const cell = make("td", {}), found = own.get(step);
        if (found) {
          const [, , small, link] = found;
          const text = `${run.label}, ${step === 0 ? "the base" : `step ${step}`}: ${shot.prompt}`;
          const inside = small
            ? make("img", { alt: text, title: text, src: `data:image/webp;base64,${small}` })
            : make("span", { className: "link", textContent: "open" });
          cell.append(make("a", { href: link, target: "_blank", rel: "noopener" }, inside));
        }
        line.append(cell);
      }
      lines.push(line);
    }
    const room = at("pictures").clientWidth - (innerWidth < 640 ? 110 : 260);
    at("grid").style.setProperty("--side", `${Math.round(Math.min(160, Math.max(92, room / steps.length - 6)))}px`);
    document.querySelector("#grid thead").replaceChildren(head);
    document.querySelector("#grid tbody").replaceChildren(...lines);
    at("pictures").querySelector(".scroll").hidden = !lines.length;
  };

  // ---- curves -----------------------------------------------------------------------------------------------------

  const smoothed = (values, factor) => {  // exponential moving average with bias correction, as in TensorBoard
    let sum = 0, weight = 0;
    return values.map(value => {
      sum = factor * sum + (1 - factor) * value;
      weight = factor * weight + (1 - factor);
      return sum / weight;
    });
  };
  const DASHES = [[], [6, 4], [2, 3], [8, 3, 2, 3]];
  const lines = {
    eval: index => [["", runs[index].eval]],
    train: index => {
      const [steps, values] = runs[index].train;
      return [["", [steps, smoothed(values, Number(at("smooth").value))]]];
    },
    sigmas: index => [["", runs[index].sigmas]],
    drift: index => Object.entries(runs[index].rows.drift),
    // the encoders' rows differ fifty-fold in length, so only lengths relative to the first one share an axis
    norm: index => Object.entries(runs[index].rows.norm).map(
      ([name, [steps, values]]) => [name, [steps, values.map(value => value / (values[0] || 1))]]),
  };
  const plots = {};
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = value => (value === null ? "" : Number(value.toPrecision(4)).toString());

  const plot = kind => {
    plots[kind]?.destroy();
    delete plots[kind];
    const box = at(`plot-${kind}`), found = [];
    for (const index of inOrder()) {
      lines[kind](index).forEach(([name, data], nth) => {
        if (data[0].length) found.push({ index, name, data, dash: DASHES[nth % DASHES.length] });
      });
    }
    box.parentElement.hidden = !found.length;
    if (!found.length) return 0;
    const axis = { stroke: css("--axis"), grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const tip = make("div", { className: "tip", hidden: true });
    const place = u => {
      const { left, top, idx } = u.cursor;
      let near = null;
      found.forEach((line, nth) => {
        const at = line.data[0].indexOf(u.data[0][idx]);
        if (at < 0) return;
        const away = Math.abs(u.valToPos(line.data[1][at], "y") - top);
        if (!near || away < near.away) near = { away, nth, value: line.data[1][at], x: line.data[0][at] };
      });
      tip.hidden = !near || left < 0;
      if (tip.hidden) return;
      const line = found[near.nth];
      const where = kind === "sigmas" ? `σ ${near.x}` : `step ${near.x}`;
      tip.replaceChildren(swatch(line.index), " ", make("b", { textContent: number(near.value) }), ` ${where} · ${runs[line.index].label} ${line.name}`);
      const right = left > u.over.clientWidth / 2;
      tip.style.left = right ? "" : `${left + u.over.offsetLeft + 12}px`;
      tip.style.right = right ? `${box.clientWidth - left - u.over.offsetLeft + 12}px` : "";
      tip.style.top = `${Math.max(0, top - 8)}px`;
    };
    const options = {
      width: box.clientWidth, height: box.clientHeight, legend: { show: false },
      scales: { x: { time: false } },
      axes: [{ ...axis, size: 30 }, { ...axis, size: 56, values: (u, splits) => splits.map(number) }],
      cursor: { y: false, points: { size: 7 }, drag: { x: true, y: false } },
      series: [{}, ...found.map(line => ({
        label: `${runs[line.index].label} ${line.name}`, stroke: colour(places.get(line.index)), width: 1.75, dash: line.dash, spanGaps: true,
        points: { show: line.data[0].length < 12, size: 5 },
      }))],
      hooks: { setCursor: [place] },
    };
    plots[kind] = new uPlot(options, uPlot.join(found.map(line => line.data)), box);
    box.append(tip);
    return found.length;
  };
  const drawPlots = () => {
    const drawn = Object.keys(lines).map(plot).reduce((a, b) => a + b, 0);
    at("no-curves").hidden = drawn > 0;
  };
  at("smooth").addEventListener("input", () => plot("train"));
  dark.addEventListener("change", () => draw());
  let resizing = 0;
  addEventListener("resize", () => {
    clearTimeout(resizing);
    resizing = setTimeout(() => {
      for (const [kind, drawn] of Object.entries(plots)) {
        drawn.setSize({ width: at(`plot-${kind}`).clientWidth, height: at(`plot-${kind}`).clientHeight });
      }
    }, 100);
  });

  // ---- drawing the page -------------------------------------------------------------------------------------------

  const inOrder = () => byLoss(chosen);
  const swatch = index => {
    const dot = make("i", { className: "swatch" });
    dot.style.setProperty("--c", colour(places.get(index)));
    return dot;
  };
  const draw = () => {
    rows.forEach((row, index) => {
      row.querySelector("input").checked = chosen.has(index);
      row.querySelector(".swatch").style.setProperty("--c", chosen.has(index) ? colour(places.get(index)) : "transparent");
    });
    const chips = inOrder().map(index => {
      const chip = make("button", { type: "button", title: `Take ${runs[index].label} out of the comparison` }, swatch(index), runs[index].shown);
      chip.addEventListener("click", () => {
        pick(index, false);
        draw();
      });
      return chip;
    });
    at("chosen").replaceChildren(...(chips.length ? chips : [make("span", { className: "quiet", textContent: "No run is chosen: tick some in the table." })]));
    drawGrid();
    drawPlots();
  };
  const reveal = () => {
    const target = location.hash.startsWith("#run-") && document.getElementById(location.hash.slice(1));
    if (target) target.open = true;
  };
  addEventListener("hashchange", reveal);
  reveal();
  filter();
  const losses = [...document.querySelectorAll("#table thead th")].findIndex(head => head.textContent.trim() === "eval loss");
  if (runs.some(run => run.loss !== null)) sort(losses, false);
  const telling = runs.map((_, index) => index).filter(index => runs[index].train[0].length || runs[index].eval[0].length);
  const first = telling.length ? telling : runs.map((_, index) => index);
  choose(first.length <= MOST ? first : byLoss(first).slice(0, BEST));
})();
