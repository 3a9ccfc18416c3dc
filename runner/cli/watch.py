"""The view of `fluxrun status --watch`: the runs of a folder as they train. It reads only files, so it works from any
terminal."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.text import Text

from runner.core import locks
from runner.core.humanize import format_duration
from runner.report.run_tables import reasons
from runner.report.tables import Column, column, fitted
from runner.report.values import number_text
from runner.runs.run import Run, find_runs
from runner.runs.state import RunState
from runner.tracking.history import read_history

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # of a sparkline and a progress bar, in characters
ORDER = ("running", "waiting", "failed", "stopped", "done")
COLOURS = {"running": "cyan", "failed": "red", "stopped": "yellow", "done": "green"}


def view(runs: Path, names: Collection[str], width: int) -> Group:
    """A summary line, a table of the named runs (all if none is named) and why runs stopped. Running ones come
    first."""
    rows = [(run, run.state()) for run in find_runs(runs) if not names or run.name in names]
    rows.sort(key=lambda row: (_rank(row[1]), row[0].name))
    states = [state for _, state in rows]
    table = fitted(
        [run.name for run, _ in rows],
        [
            column("state", [Text(state.state, style=COLOURS.get(state.state, "")) for state in states], 0),
            Column("", [_bar(state) for state in states], WIDTH, 4),
            column("step", [f"{state.step or 0}/{state.steps or '?'}" for state in states], 0, right=True),
            column("loss", [number_text(state.train_loss, ".4f") for state in states], 1, right=True),
            column("", [Text(_loss_curve(run, state), style="cyan") for run, state in rows], 6),
            column("s/step", [number_text(state.s_per_step, ".3g") for state in states], 3, right=True),
            column("left", [_time_left_text(state) for state in states], 2, right=True),
            column("last sample", [_last_sample(run) for run, _ in rows], 5),
        ],
        width,
    )
    why = reasons({run.name: state.error or state.ended for run, state in rows})
    return Group(Text(headline(runs, states)), Text(""), *table, *why)


def headline(runs: Path, states: Sequence[RunState]) -> str:
    """How many runs are in which state, which slots are in use, and how long all of it will take."""
    counts = {name: sum(state.state == name for state in states) for name in ORDER}
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no runs yet"
    slots = [
        f"{lock.name} (process {holder})"
        for lock in sorted((runs / ".slots").glob("*"))
        if (holder := locks.lock_holder(lock)) is not None
    ]
    if slots:
        text += f"; slots: {', '.join(slots)}"
    left = time_left(states)
    return text if left is None else f"{text}; all done in about {format_duration(left)}"


def time_left(states: Sequence[RunState]) -> float | None:
    """Seconds until all running and waiting runs are done, if as many run at a time as now. None while no running run
    has a time per step."""
    running = [state for state in states if state.state == "running"]
    waiting = [state for state in states if state.state == "waiting"]
    step_times = [state.s_per_step for state in running if state.s_per_step]
    if not step_times:
        return None
    typical: float = statistics.median(step_times)
    running_left = [_steps_left(state) * float(state.s_per_step or typical) for state in running]
    waiting_left = sum(_steps_left(state) for state in waiting) * typical
    return max(*running_left, (sum(running_left) + waiting_left) / len(running))


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """A curve of at most `width` block characters, each the mean of an equal part of the values; "" for no values."""
    if not values:
        return ""
    count = min(width, len(values))
    cuts = [len(values) * part // count for part in range(count + 1)]
    means = [statistics.fmean(values[start:stop]) for start, stop in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def _bar(state: RunState) -> ProgressBar:
    """Full if the run is done, even if it ended before its last planned step."""
    steps = max(1, int(state.steps or 0))
    done = steps if state.state == "done" else min(int(state.step or 0), steps)
    return ProgressBar(total=steps, completed=done, width=WIDTH)


def _loss_curve(run: Run, state: RunState) -> str:
    if state.state != "running":
        return ""
    return sparkline(list(read_history(run.history_file).get("train/loss", {}).values()))


def _time_left_text(state: RunState) -> str:
    s_per_step = state.s_per_step
    if not s_per_step or state.state not in ("running", "waiting"):
        return ""
    return format_duration(_steps_left(state) * s_per_step)


def _last_sample(run: Run) -> str:
    samples = run.sample_files()
    if not samples:
        return ""
    newest = samples[max(samples)]
    return str(newest[min(newest)])


def _steps_left(state: RunState) -> int:
    return max(0, int(state.steps or 0) - int(state.step or 0))


def _rank(state: RunState) -> int:
    return ORDER.index(state.state) if state.state in ORDER else len(ORDER)
