"""Runs side by side: the spec keys that differ, results, the held-out loss by noise level, and pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import RenderableType

from runner.core import files
from runner.core.command_line import fluxrun_command
from runner.core.errors import FluxrunError
from runner.core.humanize import format_duration
from runner.report.tables import GAP, column, wrapped
from runner.report.values import MAX_VALUE, spec_text
from runner.runs.index import Record, record_of
from runner.runs.run import Run, find_runs
from runner.runs.sample_files import samples_of
from runner.runs.short_names import short_labels
from runner.runs.spec_differences import differing_keys, distinguishing_keys, have_comparable_losses
from runner.tracking.history import read_history

SIGMA = "eval/sigma "  # begins the names of the losses at one noise level
MIN_LABEL = 12  # characters of a run's name that a column of its own must have room for
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

Comparison = Mapping[str, Any]  # what `compare` returns


def compare(runs: Path, names: Sequence[str]) -> dict[str, Any]:
    """Compare runs by name. Returns JSON values, with one entry per run in each list:

    differing: {spec key: values}; following: those of these keys that are defaults, and follow from the others.
    metrics: {name: values}. by_sigma: {"0.1": losses} of each run's last evaluation, None where it has none.
    comparable: whether all runs were evaluated on the same pictures and noise.

    Raises FluxrunError if a run does not exist, or if fewer than two are given.
    """
    chosen = _chosen_runs(runs, names)
    records = [record_of(run) for run in chosen]
    specs = [record.spec for record in records]
    losses = [_last_evaluation(run) for run in chosen]
    sigmas = sorted({sigma for by_sigma in losses for sigma in by_sigma})
    distinguishing = distinguishing_keys(records)
    following = [key for key in differing_keys(specs) if key not in distinguishing]
    return {
        "runs": [record.name for record in records],
        "comparable": have_comparable_losses(specs),
        "differing": {key: [spec.get(key) for spec in specs] for key in (*distinguishing, *following)},
        "following": following,
        "metrics": {name: [getattr(record, name) for record in records] for name in METRICS},
        "by_sigma": {sigma: [by_sigma.get(sigma) for by_sigma in losses] for sigma in sigmas},
    }


def _chosen_runs(runs: Path, names: Sequence[str]) -> list[Run]:
    by_name = {run.name: run for run in find_runs(runs)}
    wanted = list(dict.fromkeys(name.strip("/") for name in names))
    if unknown := [name for name in wanted if name not in by_name]:
        raise FluxrunError(
            f"no such run in {runs}: {', '.join(unknown)}; `{fluxrun_command('results', runs=runs)}` lists them"
        )
    if len(wanted) < 2:
        raise FluxrunError(f"comparing takes two runs or more (found {', '.join(wanted)})")
    return [by_name[name] for name in wanted]


def _last_evaluation(run: Run) -> dict[str, float]:
    """The losses by noise level, {"0.1": loss, ...}, at the last step that was evaluated."""
    history = {name: series for name, series in read_history(run.history_file).items() if name.startswith(SIGMA)}
    last = max((step for series in history.values() for step in series), default=0)
    return {name.removeprefix(SIGMA): series[last] for name, series in history.items() if last in series}


# ---- on a terminal -------------------------------------------------------------------------------------------------


def as_tables(comparison: Comparison, width: int) -> Iterator[RenderableType]:
    """Tables of at most `width` characters, and notes. Losses are measured against the first run's."""
    from rich.text import Text

    names, comparable, metrics = comparison["runs"], comparison["comparable"], comparison["metrics"]
    keys = [key for key in comparison["differing"] if key not in comparison["following"]]
    rows = [(key, [spec_text(value) or "-" for value in comparison["differing"][key]]) for key in keys]
    yield from _tables("spec", names, rows, width)
    if comparison["following"]:
        yield Text(f"defaults that follow from these: {', '.join(comparison['following'])}\n")
    rows = [_metric_row(name, values, comparable) for name, values in metrics.items() if any(values)]
    if metrics["exported_step"] == metrics["steps"]:  # as for most runs
        rows = [row for row in rows if row[0] != "exported step"]
    yield from _tables("result", names, rows, width)
    if comparison["by_sigma"]:
        against_first = ", and against the first run" if comparable else ""
        rows = [(sigma, _loss_cells(losses, comparable)) for sigma, losses in comparison["by_sigma"].items()]
        yield from _tables(f"eval loss by noise level (sigma){against_first}", names, rows, width)
    if not comparable:
        yield Text("note: evaluated on other pictures, captions or another base: these eval losses do not compare")
    elif comparison["by_sigma"]:
        yield from map(Text, _verdicts(comparison))


def _tables(
    title: str, runs: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], width: int
) -> Iterator[RenderableType]:
    """`rows`: (key, a cell per run). A column per run if there is room for that, else a row per run. Numbers are never
    cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    labels = short_labels(runs)
    key_width = max((cell_len(key) for key, _ in rows), default=0)
    cell_width = max((cell_len(cell) for _, cells in rows for cell in cells), default=0)
    column_width = (width - key_width - GAP) // len(labels) - GAP
    yield Text(title, style="italic")
    if column_width >= max(min(cell_width, MAX_VALUE), min(max(map(cell_len, labels)), MIN_LABEL)):
        table = Table(box=box.SIMPLE, show_edge=False, padding=(0, GAP - 1, 0, 0))
        table.add_column("", width=key_width, no_wrap=True)
        for label in labels:
            table.add_column(Text(label), overflow="fold", max_width=column_width)
        for key, cells in rows:
            table.add_row(Text(key), *map(Text, cells))
        yield table
    else:
        columns = (column(key, cells, 0, limit=MAX_VALUE) for key, cells in rows)
        yield from wrapped(labels, columns, width)
    yield Text("")


def _metric_row(name: str, values: Sequence[Any], comparable: bool) -> tuple[str, list[str]]:
    """(title, cells). The lowest eval loss gets a star, if the losses compare."""
    losses = [value for value in values if value is not None] if name == "eval_loss" and comparable else []
    titles = {"wall_s": "wall time", "peak_memory_bytes": "peak memory", "s_per_step": "s/step"}
    forms: dict[str, Callable[[Any], str]] = {
        "wall_s": format_duration,
        "peak_memory_bytes": lambda value: f"{value / 2**30:.2f} GiB",
        "s_per_step": lambda value: f"{value:.3g}",
        "eval_loss": lambda value: f"{value:.4f}{' *' if losses and min(losses) == value < max(losses) else ''}",
        "train_loss": lambda value: f"{value:.4f}",
    }
    form = forms.get(name, str)
    return titles.get(name, name.replace("_", " ")), ["-" if value is None else form(value) for value in values]


def _loss_cells(losses: Sequence[float | None], comparable: bool) -> list[str]:
    """The runs' losses at one noise level; if they compare, with the difference from the first run's in percent."""
    first = losses[0]
    cells = []
    for index, loss in enumerate(losses):
        difference = (
            f"  {100 * (loss / first - 1):+.1f} %" if comparable and index and loss is not None and first else ""
        )
        cells.append(("-" if loss is None else f"{loss:.4f}") + difference)
    return cells


def _verdicts(comparison: Comparison) -> Iterator[str]:
    """For each run but the first: at how many noise levels its loss is below the first run's."""
    first, *others = short_labels(comparison["runs"])
    for index, label in enumerate(others, 1):
        losses = [(row[0], row[index]) for row in comparison["by_sigma"].values()]
        pairs = [(base, loss) for base, loss in losses if base is not None and loss is not None]
        if pairs:
            lower = sum(loss < base for base, loss in pairs)
            yield f"{label} is below {first} at {lower} of {len(pairs)} noise levels"


# ---- pictures ------------------------------------------------------------------------------------------------------


def write_sheet(runs: Path, names: Sequence[str], out: Path) -> None:
    """Write the runs' last pictures side by side as a PNG: a row for each prompt and seed that all of them drew.

    Raises FluxrunError if there is no such prompt and seed.
    """
    from runner.core.contact_sheet import draw_contact_sheet

    chosen = _chosen_runs(runs, names)
    pictures = [_last_pictures(run, record_of(run)) for run in chosen]
    shared = [sample for sample in pictures[0] if all(sample in by_sample for by_sample in pictures)]
    if not shared:
        raise FluxrunError("these runs share no picture of the same prompt and seed; set validate.prompts alike")
    rows = [
        (f"{prompt} (seed {seed})", [_open_picture(by_sample[prompt, seed]) for by_sample in pictures])
        for prompt, seed in shared
    ]
    buffer = io.BytesIO()
    draw_contact_sheet(rows, short_labels([run.name for run in chosen])).save(buffer, "PNG")
    files.output_folder(out)
    files.write_bytes(out, [buffer.getvalue()])


def _last_pictures(run: Run, record: Record) -> dict[tuple[str, int], Path]:
    """The files of a run's last sampled step, by (prompt, seed)."""
    spec, by_step = record.spec, run.sample_files()
    by_number = by_step[max(by_step)] if by_step else {}
    samples = samples_of(spec.get("validate.prompts", []), spec.get("validate.count", 1), spec.get("seed", 0))
    return {sample: by_number[number] for number, sample in enumerate(samples) if number in by_number}


def _open_picture(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB")
