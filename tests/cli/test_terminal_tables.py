"""Tables on a terminal of any width, and the page's: losses and states in full, names that can be told apart."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from runner.cli import plan_view
from runner.jobs.prepare import prepare_jobs
from runner.jobs.timing import TimeEstimate
from runner.report.page import write_report
from runner.runs.short_names import shortened
from runner.spec.origins import annotated
from tests.support.browser import browser, needs_browser
from tests.support.house import House
from tests.support.run_folders import write_run

WIDTHS = [60, 80, 100, 120]
REASON = "no finite loss or gradient in 5 steps in a row (loss nan, gradient norm nan); lower train.lr, or use bf16"
COMMAND = "curl -s -X POST https://ntfy.example.org/my-topic -d the-night-is-over"
LONG = "a-single-run-with-a-very-long-name-that-somebody-typed-one-evening"


def write_said(runs: Path, name: str, swept: dict[str, Any], more: dict[str, Any], **facts: Any) -> None:
    """A run whose spec.toml says what was swept and what was set."""
    folder = write_run(runs, name, pictures=False, **facts)
    import tomllib

    tables = tomllib.loads((folder / "spec.toml").read_text())
    for key, value in {**swept, **more}.items():
        table, last = key.split(".")
        tables.setdefault(table, {})[last] = value
    origins = {**dict.fromkeys(more, "set in a.toml"), **dict.fromkeys(swept, "sweep in a.toml")}
    (folder / "spec.toml").write_text(annotated(tables, lambda key: origins.get(key, "default")))


@pytest.fixture
def wide(tmp_path: Path) -> House:
    """Two sweeps with long names and long paths, a run that failed and one whose process is gone."""
    house = House(tmp_path)
    runs = tmp_path / "runs"
    paths = {"data.source": "/home/someone/Pictures/portraits/grandmother-in-oil-1940-1960"}
    number = 0
    for rank in (4, 16):
        for lr in (1e-4, 4e-4):
            number += 1
            name = f"portrait-of-grandmother-in-oil/lora.rank={rank},train.lr={lr}"
            swept = {"lora.rank": rank, "train.lr": lr}
            write_said(runs, name, swept, paths, rank=rank, lr=lr, loss=0.5 + number / 100)
    for every in (1, 2):
        swept = {"inversion.gradient_checkpointing": every, "train.lr": 1e-3}
        name = f"night-sky/inversion.gradient_checkpointing={every},train.lr=0.001"
        write_said(runs, name, swept, {**paths, "notify.command": COMMAND}, loss=0.7 + every / 100)
    write_said(runs, LONG, {}, {}, state="failed", error=REASON, eval_loss=None)
    write_said(runs, "stopped", {}, {}, state="running", loss=0.9)
    return house


LOSSES = ["0.5100", "0.5200", "0.5300", "0.5400", "0.7100", "0.7200", "0.9000"]


def lines_at(house: House, monkeypatch: pytest.MonkeyPatch, width: int, *words: str) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    said = house.fluxrun(*words)
    assert said.code == 0, said.err
    return said.out.splitlines()


def body(lines: list[str]) -> list[str]:
    """The rows of the first table: what stands between its rule and the first line that is none of it."""
    start = next(at for at, line in enumerate(lines) if line.strip("─ ") == "" and "─" in line)
    width = cell_len(lines[start])
    return [line for line in lines[start + 1 : start + 9] if cell_len(line) <= width]


@pytest.mark.parametrize("width", WIDTHS)
def test_results_fit_the_terminal(wide: House, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    lines = lines_at(wide, monkeypatch, width, "results")
    rows = body(lines)
    assert len(rows) == 8
    assert max(map(cell_len, rows)) <= width
    names = [re.split(r" {2,}", row)[0] for row in rows]
    assert len(set(names)) == 8
    assert [name[:9] for name in names if name.startswith("night")] == ["night-sky"] * 2
    assert sum(name.startswith("portra") for name in names) == 4
    words = [row.split() for row in rows]
    assert [word[1] for word in words] == ["failed", *["done"] * 6, "stopped"]
    assert sorted(word[2] for word in words[1:]) == LOSSES  # the failed one has none
    head = " ".join(lines[: lines.index(rows[0])])
    assert head.index("state") < head.index("eval loss") < head.index("lora.rank") < head.index("train.lr")
    assert "0…" not in "".join(lines)
    assert f"{LONG}: {REASON}" in lines
    assert "stopped: its process is gone" in lines


def test_what_has_no_room_is_named_and_paths_come_last(wide: House, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = lines_at(wide, monkeypatch, 80, "results")
    [left] = [line for line in narrow if line.startswith("not shown for lack of room: ")]
    assert left.endswith("peak memory, exports, data.source, notify.command")
    full = lines_at(wide, monkeypatch, 240, "results")
    assert not [line for line in full if line.startswith("not shown")]
    head = full[: next(at for at, line in enumerate(full) if "─" in line)]
    assert head[-1].index("peak memory") < head[-1].index("data.source") < head[-1].index("notify.command")
    assert COMMAND not in "".join(full)  # cut in the middle
    assert "curl -s -X P…" in "".join(full)


def test_a_short_path_comes_last_too(tmp_path: Path) -> None:
    house = House(tmp_path)
    for name, source in (("a", "x/y"), ("b", "x/z")):
        write_said(tmp_path / "runs", name, {}, {"data.source": source, "data.repeats": len(source) * ord(name)})
    head = house.fluxrun("results").out.splitlines()[0]
    assert head.index("eval loss") < head.index("data.repeats") < head.index("exports") < head.index("data.source")


@pytest.mark.parametrize("width", WIDTHS)
def test_status_fits_the_terminal(wide: House, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    lines = lines_at(wide, monkeypatch, width, "status")
    rows = body(lines)
    assert len(rows) == 8
    assert max(map(cell_len, rows)) <= width
    assert len({re.split(r" {2,}", row)[0] for row in rows}) == 8
    assert all(re.search(r" (done|failed|stopped) .* 100/100 ", f"{row} ") for row in rows)
    assert f"{LONG}: {REASON}" in lines


@pytest.mark.parametrize("width", WIDTHS)
def test_watching_fits_the_terminal(wide: House, width: int) -> None:
    from runner.cli import watch

    console = Console(width=width)
    with console.capture() as shown:
        console.print(watch.view(wide.folder / "runs", (), width))
    rows = [line for line in shown.get().splitlines() if "100/100" in line]
    assert len(rows) == 8
    assert all(any(state in row for state in ("done", "failed", "stopped")) for row in rows)
    assert len({re.split(r" {2,}", row)[0] for row in rows}) == 8


@pytest.mark.parametrize("width", WIDTHS)
def test_compare_cuts_no_number_however_many_runs(wide: House, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    runs = sorted(path.parent.relative_to(wide.folder / "runs") for path in wide.folder.glob("runs/*/*/spec.toml"))
    lines = lines_at(wide, monkeypatch, width, "compare", *map(str, runs))
    tables = [line for line in lines if "  " in line]
    assert max(map(cell_len, tables)) <= width
    for loss in LOSSES[:-1]:
        assert any(loss in line.split() for line in lines), loss
    by_sigma = json.loads(wide.fluxrun("compare", *map(str, runs), "--json").out)["by_sigma"]
    assert len(by_sigma) == 9
    for loss in (f"{loss:.4f}" for losses in by_sigma.values() for loss in losses):
        assert any(loss in line.split() for line in lines), loss
    assert {"curl", "16", "0.0004"} <= {word for line in lines for word in line.split()}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_picture_of_the_night_fits_the_terminal(tmp_path: Path, width: int) -> None:
    house = House(tmp_path)
    sweep = (
        '[sweep]\n"lora.rank" = [4, 8]\n"train.lr" = [1e-4, 4e-4]\n"inversion.gradient_checkpointing" = [true, false]\n'
    )
    spec = house.write("portrait-of-grandmother-in-oil.toml", house.spec("base").read_text() + sweep)
    jobs = prepare_jobs([spec], tmp_path / "runs", fetch=False, fresh=False)
    console = Console(width=width)
    with console.capture() as shown:
        plan_view.print_plan(console, jobs, [TimeEstimate(6, 3500.0, 21000.0, 3 << 30, False)] * 8, {}, time.time())
    lines = shown.get().splitlines()
    head, rule, *rows = lines[: next(at for at, line in enumerate(lines) if line.startswith("sweep of "))]
    assert max(map(cell_len, (head, rule, *rows))) <= width
    assert head.split()[:2] == ["run", "phases"]
    assert head.split()[-3:] == (["s/step", "takes", "ends"] if width == 120 else ["steps", "takes", "ends"])
    names = [row.split()[0] for row in rows if row.startswith("portrait")]
    assert len(names) == 8
    assert width == 60 or len(set(names)) == 8  # in two lines
    assert sum(" 5:50:00 " in row for row in rows) == 8


@given(st.lists(st.text("ab/:,=.-_ é雪", min_size=1, max_size=60), max_size=12, unique=True), st.integers(12, 40))
def test_shortened_texts_fit_and_stay_different(texts: list[str], width: int) -> None:
    short = shortened(texts, width)
    assert all(cell_len(text) <= width for text in short)
    assert len(set(short)) == len(texts)
    assert [text for text, cut in zip(texts, short, strict=True) if cell_len(text) <= width and cut != text] == []


def test_a_sweep_keeps_its_name_and_its_values() -> None:
    names = [f"cat/lora.rank={rank},train.lr={lr}" for rank in (4, 16) for lr in (0.0001, 0.0004)]
    assert shortened(names, 40) == names
    assert shortened(names, 22) == [
        "cat/rank=4,lr=0.0001", "cat/rank=4,lr=0.0004", "cat/rank=16,lr=0.0001", "cat/rank=16,lr=0.0004",
    ]  # fmt: skip
    assert shortened(names, 14) == ["cat/4,0.0001", "cat/4,0.0004", "cat/16,0.0001", "cat/16,0.0004"]
    assert shortened(["cat/model.base=black-forest-labs-FLUX.1-dev,lora.rank=4"], 20) == ["cat/…bs-FLUX.1-dev,4"]
    assert shortened(["one-and-the-same-beginning-1-end", "one-and-the-same-beginning-2-end"], 16) == [
        "one-and-…g-1-end", "one-and-…g-2-end",
    ]  # fmt: skip
    assert shortened(["aaaaaaaaaaaa1bbbbbbbbbbbb", "aaaaaaaaaaaa2bbbbbbbbbbbb"], 12) == ["aa…1bbbbbbb…", "aa…2bbbbbbb…"]


def test_texts_that_differ_in_two_far_places_stay_different() -> None:
    texts = [f"{'x' * 20}{one}{'y' * 20}{two}{'z' * 9}" for one, two in ((1, 1), (1, 2), (2, 1))]
    assert shortened(texts, 12) == ["xx…1yyyyyyy…", "xx…1yyyyyy~2", "xx…2yyyyyyy…"]


# ---- the page ------------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("width", [1000, 1400])
def test_the_page_shows_state_loss_and_what_was_swept_without_scrolling(wide: House, width: int) -> None:
    with browser(width, 900) as driver:
        driver.get(write_report(wide.folder / "runs").resolve().as_uri())
        ends = driver.execute_script(
            """const box = document.querySelector('#runs .scroll').getBoundingClientRect();
            return [...document.querySelectorAll('#table thead th')].map(head => [
              head.textContent.trim(), head.getBoundingClientRect().right <= box.right])"""
        )
    titles = [title for title, _ in ends]
    assert titles[1:7] == ["run", "state", "eval loss", "lora.rank", "train.lr", "inversion.gradient_checkpointing"]
    assert titles[-2:] == ["data.source", "notify.command"]
    assert [inside for _, inside in ends[:7]] == [True] * 7
    if width == 1400:
        assert dict(ends)["memory"]  # every number


@needs_browser
def test_the_page_marks_no_best_loss_where_they_do_not_compare(wide: House, tmp_path: Path) -> None:
    write_run(tmp_path / "alike", "a", loss=0.4)
    write_run(tmp_path / "alike", "b", loss=0.5)
    best = "return [...document.querySelectorAll('#table td.best')].map(cell => cell.textContent)"
    with browser() as driver:
        driver.get(write_report(tmp_path / "alike").resolve().as_uri())
        assert driver.execute_script(best) == ["0.4000"]
        driver.get(write_report(wide.folder / "runs").resolve().as_uri())
        assert driver.execute_script(best) == []
