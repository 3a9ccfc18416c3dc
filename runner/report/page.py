"""The results page: what the run folders tell, in one HTML file that opens from disk. No torch.

The table, the details and everything else that comes from specs, captions and logs goes through Jinja's autoescape; what
the charts and the picture grid need goes in as JSON, which the page's script puts into text nodes only. A content
security policy lets no other script run than the two that are written here.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runner.core import files
from runner.core.command_line import fluxrun_command
from runner.core.humanize import format_duration
from runner.report.tables import LONGEST_VALUE, number_text, spec_text, steps_text
from runner.report.thumbnails import Thumbs, evenly
from runner.runs.index import Record, comparable_key, distinguishing_keys, record_of, short_labels, swept_keys
from runner.runs.run import Run, find_runs
from runner.runs.sample_files import samples_of
from runner.runs.short_names import shortened
from runner.tracking.history import Series, read_history

PAGE = Path(__file__).parent / "template"
POINTS = 240  # of a curve
MOST_THUMBS = 1500  # of the page, and of one run and prompt
STEPS_SHOWN = 8
MOST_BYTES = 8_000_000  # of all thumbnails
LOG_LINES = 25
LONGEST_NAME = 34  # characters of a run in the table


def write_report(runs: Path) -> Path:
    """Write RUNS/index.html whole, and return its path."""
    html = render(runs).encode(errors="replace").decode()  # a folder's name need not be text
    files.write_text(files.make_folder(runs) / "index.html", html)
    return runs / "index.html"


@dataclass(frozen=True)
class Folder:
    """One run as the page needs it. label: its name without what all runs share; shown: that, cut where it is too long."""

    run: Run
    record: Record
    label: str
    shown: str
    step: int
    phase: str
    series: Mapping[str, Series]


def render(runs: Path) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    found = _folders(runs)
    records = [one.record for one in found]
    keys = distinguishing_keys(records)
    swept, long = swept_keys(records), _long_keys(keys, records)
    first = [key for key in keys if key in swept or key not in long]
    compares = comparable_key(record.spec for record in records)
    data = {"compares": compares, "runs": [_curves(one) for one in found], "shots": _pictures(runs, found)}
    scripts = [(PAGE / name).read_text(encoding="utf-8") for name in ("uPlot.iife.min.js", "report.js")]
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        css=[Markup((PAGE / name).read_text(encoding="utf-8")) for name in ("uPlot.min.css", "report.css")],
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        data=data,
        first_keys=first,
        last_keys=[key for key in keys if key not in first],
        rows=[_row(one) for one in found],
        compares=compares,
        details=[_details(one, runs) for one in found],
        summary=_summary(found),
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=version("fluxrun"),
    )


def _long_keys(keys: Sequence[str], records: Sequence[Record]) -> set[str]:
    """Those with paths, commands, addresses and the like, which would push the numbers out of sight."""
    texts = {key: [spec_text(record.spec[key]) for record in records if key in record.spec] for key in keys}
    return {key for key, found in texts.items() if any("/" in one or len(one) > LONGEST_VALUE for one in found)}


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _folders(runs: Path) -> list[Folder]:
    found = list(find_runs(runs))
    labels = short_labels([run.name for run in found])
    out = []
    for run, label, shown in zip(found, labels, shortened(labels, LONGEST_NAME), strict=True):
        state = run.state()
        step, phase = state.get("step"), state.get("phase")
        out.append(
            Folder(
                run, record_of(run), label, shown, step if type(step) is int else 0,
                phase if isinstance(phase, str) else "", read_history(run.history_file),
            )
        )  # fmt: skip
    return out


def _summary(found: Sequence[Folder]) -> dict[str, Any]:
    states: dict[str, int] = {}
    for one in found:
        states[one.record.state] = states.get(one.record.state, 0) + 1
    with_loss = [one for one in found if one.record.eval_loss is not None]
    best = min(with_loss, key=lambda one: one.record.eval_loss or 0.0) if with_loss else None
    order = ("done", "running", "waiting", "stopped", "failed")
    return {
        "count": len(found),
        "states": sorted(states.items(), key=lambda item: order.index(item[0]) if item[0] in order else 9),
        "wall": format_duration(sum(one.record.wall_s or 0.0 for one in found)),
        "best": best and {"label": best.label, "at": found.index(best), "loss": f"{best.record.eval_loss:.4f}"},
        "failed": [one.run.name for one in found if one.record.state == "failed"],
    }


# ---- the table -----------------------------------------------------------------------------------------------------


def _row(one: Folder) -> dict[str, Any]:
    """Cells as (text, value to sort by)."""
    record = one.record
    memory = record.peak_memory_bytes
    return {
        "name": one.run.name,
        "label": one.label,
        "shown": one.shown,
        "state": record.state,
        "spec": {key: (spec_text(value), value if _is_number(value) else None) for key, value in record.spec.items()},
        "eval": (number_text(record.eval_loss, ".4f"), record.eval_loss),
        "train": (number_text(record.train_loss, ".4f"), record.train_loss),
        "steps": (steps_text(record), one.step),
        "pace": (number_text(record.s_per_step, ".3g"), record.s_per_step),
        "wall": (format_duration(record.wall_s) if record.wall_s else "", record.wall_s),
        "memory": (number_text(memory and memory / 2**30, ".2f"), memory),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


# ---- curves --------------------------------------------------------------------------------------------------------


def _curves(one: Folder) -> dict[str, Any]:
    """[[steps], [values]] each; sigmas: [[sigma], [loss]] of the last look."""
    found = one.series
    sigmas = sorted(
        (float(name.removeprefix("eval/sigma ")), list(series.values())[-1])
        for name, series in found.items()
        if name.startswith("eval/sigma 0.") and name.removeprefix("eval/sigma 0.").isdecimal()
    )
    return {
        "name": one.run.name,
        "label": one.label,
        "shown": one.shown,
        "state": one.record.state,
        "loss": one.record.eval_loss,
        "eval": _thinned(found.get("eval/loss", {})),
        "train": _thinned(found.get("train/loss", {})),
        "sigmas": [[sigma for sigma, _ in sigmas], [loss for _, loss in sigmas]],
        "rows": {
            kind: {
                name.removeprefix(f"rows/{kind} "): _thinned(series)
                for name, series in found.items()
                if name.startswith(f"rows/{kind} ")
            }
            for kind in ("norm", "drift")
        },
    }


def _thinned(series: Series) -> list[list[float]]:
    """At most POINTS points: means over equal spans of a long curve, since a single step's loss is mostly noise."""
    steps, values = list(series), list(series.values())
    size = -(-len(steps) // POINTS) or 1
    return [
        [steps[min(at + size, len(steps)) - 1] for at in range(0, len(steps), size)],
        [float(f"{_mean(values[at : at + size]):.5g}") for at in range(0, len(steps), size)],
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---- pictures ------------------------------------------------------------------------------------------------------


def _pictures(runs: Path, found: Sequence[Folder]) -> list[dict[str, Any]]:
    """Per prompt and seed: the pictures of every run that drew it, [run, step, WebP in base64 or None, link]."""
    by_shot: dict[tuple[str, int], list[tuple[int, int, Path]]] = {}
    lines: dict[tuple[str, int], set[int]] = {}
    for index, one in enumerate(found):
        for step, numbers in one.run.sample_files().items():
            for number, shot in enumerate(_shots(one.record.spec)):
                if number in numbers:
                    by_shot.setdefault(shot, []).append((index, step, numbers[number]))
                    lines.setdefault(shot, set()).add(index)
    each = max(1, min(STEPS_SHOWN, MOST_THUMBS // max(1, sum(map(len, lines.values())))))
    thumbs, size, out = Thumbs(runs), 0, []
    for (prompt, seed), pictures in by_shot.items():
        cells = []
        for index in sorted(lines[prompt, seed]):
            own = {step: path for at, step, path in pictures if at == index}
            for step in evenly(own, each):
                small = thumbs.of(own[step]) if size < MOST_BYTES else None
                size += len(small or b"")
                cells.append([index, step, small and base64.b64encode(small).decode(), _link(own[step], runs)])
        out.append({"prompt": prompt, "seed": seed, "cells": cells})
    thumbs.forget_others()
    return out


def _shots(spec: Mapping[str, Any]) -> list[tuple[str, int]]:
    prompts, count, seed = spec.get("validate.prompts", []), spec.get("validate.count", 1), spec.get("seed", 0)
    if not isinstance(prompts, list) or type(count) is not int or type(seed) is not int:
        return []
    return samples_of([str(prompt) for prompt in prompts], min(count, 64), seed)


def _link(path: Path, runs: Path) -> str:
    """Relative to the page, and nothing but that: the dot keeps a name from being taken for a scheme."""
    return "./" + quote(path.relative_to(runs).as_posix(), errors="surrogateescape")


# ---- details -------------------------------------------------------------------------------------------------------


def _details(one: Folder, runs: Path) -> dict[str, Any]:
    run, record = one.run, one.record
    exports = [run.folder / name for name in record.exports]
    inside = [path for path in exports if path.is_file() and path.resolve().is_relative_to(run.folder.resolve())]
    others = [run.samples / "before-after.png", run.spec_file, run.log_file, run.history_file]
    facts = {
        "state": record.state,
        "phase": one.phase,
        "steps": f"{one.step} of {record.steps or '?'}",
        "started": _day(record.started),
        "finished": _day(record.finished),
        "ended early": record.ended or "",
        "best step": str(record.best_step or ""),
        "exported step": str(record.exported_step or ""),
        "warning": record.warning or "",
        "attempts": str(record.attempts or ""),
        "base": record.base or "",
        "versions": ", ".join(f"{name} {number}" for name, number in record.versions.items()),
    }
    return {
        **asdict(record),
        "label": one.label,
        "facts": {key: value for key, value in facts.items() if value},
        "log": [] if record.state == "done" else _last_lines(run.log_file),
        "exports": [(path.name, _link(path, runs)) for path in inside],
        "links": [(path.name, _link(path, runs)) for path in others if path.is_file()],
        "commands": _commands(one, runs),
        "spec": {key: spec_text(value) for key, value in record.spec.items()},
    }


def _commands(one: Folder, runs: Path) -> list[tuple[str, str]]:
    """(what for, what to type) in the folder that fluxrun is typed in. A folder moved aside by --fresh has the spec of a run
    of another name, which is what its commands would be about: it gets none of them."""
    run, record = one.run, one.record
    out = []
    if not run.is_archived():
        if record.state != "done":
            allow = ["--allow-commands"] if record.spec.get("notify.command") else []
            out.append(("go on", ["queue", str(run.spec_file), *allow]))
        if record.exports:
            prompts = record.spec.get("validate.prompts") or ["..."]
            out.append(("more pictures", ["sample", run.name, "--prompt", str(prompts[0]), "--count", "4"]))
        if record.steps and run.checkpoint_files():
            out.append(("export again", ["export", run.name]))
    out.append(("watch in TensorBoard", ["board"]))
    return [(what, fluxrun_command(*words, runs=runs)) for what, words in out]


def _last_lines(path: Path) -> list[str]:
    if not path.is_file() or path.is_symlink():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 300 * LOG_LINES))
        return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]


def _day(moment: float | None) -> str:
    try:
        return "" if moment is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    except (ValueError, OverflowError, OSError):
        return ""
