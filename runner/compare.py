"""Runs side by side: the spec keys that differ, how they did, the held-out loss per noise level, pictures. No torch."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner import files
from runner.clock import clock
from runner.commandline import command
from runner.errors import FluxrunError
from runner.index import Record, comparable, differing, record_of, short_labels
from runner.rundir import Run, find_runs
from runner.series import read_history
from runner.shots import shots

SIGMA = "eval/sigma "
METRICS = ("state", "steps", "eval_loss", "train_loss", "s_per_step", "wall_s", "peak_memory_bytes", "attempts")


def compare(runs: Path, names: Sequence[str]) -> dict[str, Any]:
    """JSON values. by_sigma: {"0.1": [loss of each run or None]}, of each run's last look, on the same pictures and noise.

    Raises FluxrunError where a name is no run's, or fewer than two are given.
    """
    chosen = _chosen(runs, names)
    records = [record_of(run) for run in chosen]
    specs = [record.spec for record in records]
    by_sigma = [_last_look(run) for run in chosen]
    sigmas = sorted({sigma for one in by_sigma for sigma in one})
    return {
        "runs": [record.name for record in records],
        "comparable": comparable(specs),
        "differing": {key: [spec.get(key) for spec in specs] for key in differing(specs)},
        "metrics": {name: [getattr(record, name) for record in records] for name in METRICS},
        "by_sigma": {sigma: [one.get(sigma) for one in by_sigma] for sigma in sigmas},
    }


def _chosen(runs: Path, names: Sequence[str]) -> list[Run]:
    known = {run.name: run for run in find_runs(runs)}
    wanted = list(dict.fromkeys(name.strip("/") for name in names))
    if unknown := [name for name in wanted if name not in known]:
        raise FluxrunError(f"no such run in {runs}: {', '.join(unknown)}; `{command('results', runs=runs)}` lists them")
    if len(wanted) < 2:
        raise FluxrunError(f"comparing takes two runs or more (found {', '.join(wanted)})")
    return [known[name] for name in wanted]


def _last_look(run: Run) -> dict[str, float]:
    """{"0.1": loss, ...} at the run's last look."""
    found = {name: series for name, series in read_history(run.history_file).items() if name.startswith(SIGMA)}
    last = max((step for series in found.values() for step in series), default=0)
    return {name.removeprefix(SIGMA): series[last] for name, series in found.items() if last in series}


# ---- on a terminal -------------------------------------------------------------------------------------------------


def as_tables(found: Mapping[str, Any]) -> Iterator[Any]:
    """rich tables and notes. The first run is the one that others are measured by."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def table(title: str, rows: Sequence[tuple[str, Sequence[str]]]) -> Table:
        made = Table(box=box.SIMPLE, title=title, title_justify="left")
        made.add_column("")
        for name in short_labels(found["runs"]):
            made.add_column(Text(name), overflow="fold")
        for key, cells in rows:
            made.add_row(Text(key), *map(Text, cells))
        return made

    yield table("spec", [(key, list(map(_cell, values))) for key, values in found["differing"].items()])
    yield table("result", [_metric(name, values) for name, values in found["metrics"].items() if any(values)])
    if found["by_sigma"]:
        rows = [(sigma, _against_first(losses)) for sigma, losses in found["by_sigma"].items()]
        yield table("eval loss by noise level (sigma), and against the first run", rows)
        for verdict in _verdicts(found):
            yield Text(verdict)
    if not found["comparable"]:
        yield Text("note: evaluated on other pictures, captions or another base: these eval losses do not compare")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _metric(name: str, values: Sequence[Any]) -> tuple[str, list[str]]:
    """With the best of the losses marked."""
    known = [value for value in values if value is not None]
    shown: dict[str, Any] = {
        "wall_s": clock,
        "peak_memory_bytes": lambda value: f"{value / 2**30:.2f} GiB",
        "s_per_step": lambda value: f"{value:.3g}",
        "eval_loss": lambda value: f"{value:.4f}{' *' if min(known) == value < max(known) else ''}",
        "train_loss": lambda value: f"{value:.4f}",
    }
    form = shown.get(name, str)
    titles = {"wall_s": "wall time", "peak_memory_bytes": "peak memory", "s_per_step": "s/step"}
    return titles.get(name, name.replace("_", " ")), ["-" if value is None else form(value) for value in values]


def _against_first(losses: Sequence[float | None]) -> list[str]:
    first, *others = losses
    cells = [_loss(first)]
    for loss in others:
        way = f"  {100 * (loss / first - 1):+.1f} %" if loss is not None and first else ""
        cells.append(_loss(loss) + way)
    return cells


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _verdicts(found: Mapping[str, Any]) -> Iterator[str]:
    first, *others = short_labels(found["runs"])
    for place, name in enumerate(others, 1):
        pairs = [(a[0], a[place]) for a in found["by_sigma"].values() if a[0] is not None and a[place] is not None]
        if pairs:
            lower = sum(b < a for a, b in pairs)
            yield f"{name} is below {first} at {lower} of {len(pairs)} noise levels"


# ---- pictures ------------------------------------------------------------------------------------------------------


def write_sheet(runs: Path, names: Sequence[str], out: Path) -> None:
    """The runs' last pictures side by side, a row per prompt and seed that all of them drew. Raises FluxrunError."""
    from runner.sheet import sheet

    chosen = _chosen(runs, names)
    drawn = [_last_pictures(run, record_of(run)) for run in chosen]
    shared = [shot for shot in drawn[0] if all(shot in one for one in drawn)]
    if not shared:
        raise FluxrunError("these runs share no picture of the same prompt and seed; set validate.prompts alike")
    rows = [(f"{prompt} (seed {seed})", [_opened(one[prompt, seed]) for one in drawn]) for prompt, seed in shared]
    buffer = io.BytesIO()
    sheet(rows, short_labels([run.name for run in chosen])).save(buffer, "PNG")
    files.folder_for(out)
    files.write_bytes(out, [buffer.getvalue()])


def _last_pictures(run: Run, record: Record) -> dict[tuple[str, int], Path]:
    own, steps = record.spec, run.sample_files()
    numbers = steps[max(steps)] if steps else {}
    wanted = shots(own.get("validate.prompts", []), own.get("validate.count", 1), own.get("seed", 0))
    return {shot: numbers[number] for number, shot in enumerate(wanted) if number in numbers}


def _opened(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as opened:
        return opened.convert("RGB")
