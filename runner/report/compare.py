"""Runs side by side: the spec keys that differ, how they did, the held-out loss per noise level, pictures. No torch."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from runner.core import files
from runner.core.command_line import fluxrun_command
from runner.core.errors import FluxrunError
from runner.core.humanize import format_duration
from runner.report.tables import GAP, LONGEST_VALUE, column, spec_text, wrapped
from runner.runs.index import Record, comparable_key, differing_keys, distinguishing_keys, record_of, short_labels
from runner.runs.run import Run, find_runs
from runner.runs.sample_files import samples_of
from runner.tracking.history import read_history

SIGMA = "eval/sigma "
LEAST_LABEL = 12  # characters of a run's name at the head of its column
METRICS = (
    "state",
    "steps",
    "exported_step",
    "eval_loss",
    "train_loss",
    "s_per_step",
    "wall_s",
    "peak_memory_bytes",
    "attempts",
)


def compare(runs: Path, names: Sequence[str]) -> dict[str, Any]:
    """JSON values. by_sigma: {"0.1": [loss of each run or None]}, of each run's last look; `comparable` says whether those
    were all on the same pictures and noise; following: keys of `differing` that are defaults and follow from the others.

    Raises FluxrunError where a name is no run's, or fewer than two are given.
    """
    chosen = _chosen(runs, names)
    records = [record_of(run) for run in chosen]
    specs = [record.spec for record in records]
    by_sigma = [_last_look(run) for run in chosen]
    sigmas = sorted({sigma for one in by_sigma for sigma in one})
    told = distinguishing_keys(records)
    following = [key for key in differing_keys(specs) if key not in told]
    return {
        "runs": [record.name for record in records],
        "comparable": comparable_key(specs),
        "differing": {key: [spec.get(key) for spec in specs] for key in (*told, *following)},
        "following": following,
        "metrics": {name: [getattr(record, name) for record in records] for name in METRICS},
        "by_sigma": {sigma: [one.get(sigma) for one in by_sigma] for sigma in sigmas},
    }


def _chosen(runs: Path, names: Sequence[str]) -> list[Run]:
    known = {run.name: run for run in find_runs(runs)}
    wanted = list(dict.fromkeys(name.strip("/") for name in names))
    if unknown := [name for name in wanted if name not in known]:
        raise FluxrunError(
            f"no such run in {runs}: {', '.join(unknown)}; `{fluxrun_command('results', runs=runs)}` lists them"
        )
    if len(wanted) < 2:
        raise FluxrunError(f"comparing takes two runs or more (found {', '.join(wanted)})")
    return [known[name] for name in wanted]


def _last_look(run: Run) -> dict[str, float]:
    """{"0.1": loss, ...} at the run's last look."""
    found = {name: series for name, series in read_history(run.history_file).items() if name.startswith(SIGMA)}
    last = max((step for series in found.values() for step in series), default=0)
    return {name.removeprefix(SIGMA): series[last] for name, series in found.items() if last in series}


# ---- on a terminal -------------------------------------------------------------------------------------------------


def as_tables(found: Mapping[str, Any], width: int) -> Iterator[Any]:
    """rich tables of at most `width`, and notes. The first run is the one that others are measured by."""
    from rich.text import Text

    compares, told = found["comparable"], found["metrics"]
    specs = {key: values for key, values in found["differing"].items() if key not in found["following"]}
    rows = [(key, [spec_text(value) or "-" for value in values]) for key, values in specs.items()]
    yield from _tables("spec", found["runs"], rows, width)
    if found["following"]:
        yield Text(f"defaults that follow from these: {', '.join(found['following'])}\n")
    rows = [_metric(name, values, compares) for name, values in told.items() if any(values)]
    if told["exported_step"] == told["steps"]:  # as most are
        rows = [row for row in rows if row[0] != "exported step"]
    yield from _tables("result", found["runs"], rows, width)
    if found["by_sigma"]:
        against = ", and against the first run" if compares else ""
        rows = [(sigma, _by_sigma(losses, compares)) for sigma, losses in found["by_sigma"].items()]
        yield from _tables(f"eval loss by noise level (sigma){against}", found["runs"], rows, width)
    if not compares:
        yield Text("note: evaluated on other pictures, captions or another base: these eval losses do not compare")
    elif found["by_sigma"]:
        yield from map(Text, _verdicts(found))


def _tables(title: str, runs: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], width: int) -> Iterator[Any]:
    """A column for each run where there is room for that, else a line for each. Numbers are never cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = short_labels(runs)
    keys = max((cell_len(key) for key, _ in rows), default=0)
    widest = max((cell_len(cell) for _, cells in rows for cell in cells), default=0)
    each = (width - keys - GAP) // len(names) - GAP
    yield Text(title, style="italic")
    if each >= max(min(widest, LONGEST_VALUE), min(max(map(cell_len, names)), LEAST_LABEL)):
        made = Table(box=box.SIMPLE, show_edge=False, padding=(0, GAP - 1, 0, 0))
        made.add_column("", width=keys, no_wrap=True)
        for name in names:
            made.add_column(Text(name), overflow="fold", max_width=each)
        for key, cells in rows:
            made.add_row(Text(key), *map(Text, cells))
        yield made
    else:
        columns = (column(key, cells, 0, limit=LONGEST_VALUE) for key, cells in rows)
        yield from wrapped(names, columns, width)
    yield Text("")


def _metric(name: str, values: Sequence[Any], compares: bool) -> tuple[str, list[str]]:
    """With the best of the losses marked, where they compare."""
    known = [value for value in values if value is not None]
    shown: dict[str, Any] = {
        "wall_s": format_duration,
        "peak_memory_bytes": lambda value: f"{value / 2**30:.2f} GiB",
        "s_per_step": lambda value: f"{value:.3g}",
        "eval_loss": lambda value: f"{value:.4f}{' *' if compares and min(known) == value < max(known) else ''}",
        "train_loss": lambda value: f"{value:.4f}",
    }
    form = shown.get(name, str)
    titles = {"wall_s": "wall time", "peak_memory_bytes": "peak memory", "s_per_step": "s/step"}
    return titles.get(name, name.replace("_", " ")), ["-" if value is None else form(value) for value in values]


def _by_sigma(losses: Sequence[float | None], compares: bool) -> list[str]:
    """Each loss, the later ones with their difference from the first where they compare."""
    if not compares:
        return list(map(_loss, losses))
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
    from runner.core.contact_sheet import draw_contact_sheet

    chosen = _chosen(runs, names)
    drawn = [_last_pictures(run, record_of(run)) for run in chosen]
    shared = [shot for shot in drawn[0] if all(shot in one for one in drawn)]
    if not shared:
        raise FluxrunError("these runs share no picture of the same prompt and seed; set validate.prompts alike")
    rows = [(f"{prompt} (seed {seed})", [_opened(one[prompt, seed]) for one in drawn]) for prompt, seed in shared]
    buffer = io.BytesIO()
    draw_contact_sheet(rows, short_labels([run.name for run in chosen])).save(buffer, "PNG")
    files.output_folder(out)
    files.write_bytes(out, [buffer.getvalue()])


def _last_pictures(run: Run, record: Record) -> dict[tuple[str, int], Path]:
    own, steps = record.spec, run.sample_files()
    numbers = steps[max(steps)] if steps else {}
    wanted = samples_of(own.get("validate.prompts", []), own.get("validate.count", 1), own.get("seed", 0))
    return {shot: numbers[number] for number, shot in enumerate(wanted) if number in numbers}


def _opened(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as opened:
        return opened.convert("RGB")
