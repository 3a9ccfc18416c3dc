"""The view of `fluxrun status --watch`: the runs of a folder as they train. It reads only files, so it works from any terminal."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.text import Text

from runner.core import locks
from runner.core.humanize import format_duration
from runner.report.run_tables import reasons
from runner.report.tables import Column, column, fitted
from runner.report.values import number_text
from runner.runs.run import Run, find_runs
from runner.tracking.history import read_history

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # of a sparkline and a progress bar, in characters
ORDER = ("running", "waiting", "failed", "stopped", "done")
COLOURS = {"running": "cyan", "failed": "red", "stopped": "yellow", "done": "green"}

State = Mapping[str, Any]  # a run's state.json


def view(runs: Path, names: Collection[str], width: int) -> Group:
    """A summary line, a table of the named runs (all if none is named) and why runs stopped. Running ones come first."""
    rows = [(run, run.state()) for run in find_runs(runs) if not names or run.name in names]
    rows.sort(key=lambda row: (_rank(row[1]), row[0].name))
    states = [state for _, state in rows]
    table = fitted(
        [run.name for run, _ in rows],
        [
            column("state", [Text(_name(state), style=COLOURS.get(_name(state), "")) for state in states], 0),
            Column("", [_bar(state) for state in states], WIDTH, 4),
            column("step", [f"{state.get('step', 0)}/{state.get('steps') or '?'}" for state in states], 0, right=True),
            column("loss", [number_text(state.get("train_loss"), ".4f") for state in states], 1, right=True),
            column("", [Text(_loss_curve(run, state), style="cyan") for run, state in rows], 6),
            column("s/step", [number_text(state.get("s_per_step"), ".3g") for state in states], 3, right=True),
            column("left", [_time_left_text(state) for state in states], 2, right=True),
            column("last sample", [_last_sample(run) for run, _ in rows], 5),
        ],
        width,
    )
    why = reasons({run.name: state.get("error") or state.get("ended") for run, state in rows})
    return Group(Text(headline(runs, states)), Text(""), *table, *why)


def headline(runs: Path, states: Sequence[State]) -> str:
    """How many runs are in which state, which slots are in use, and how long all of it will take."""
    counts = {name: sum(_name(state) == name for state in states) for name in ORDER}
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


def time_left(states: Sequence[State]) -> float | None:
    """Seconds until all running and waiting runs are done, if as many run at a time as now. None while no running run has
    a time per step."""
    running = [state for state in states if _name(state) == "running"]
    waiting = [state for state in states if _name(state) == "waiting"]
    step_times = [state["s_per_step"] for state in running if state.get("s_per_step")]
    if not step_times:
        return None
    typical: float = statistics.median(step_times)
    running_left = [_steps_left(state) * float(state.get("s_per_step") or typical) for state in running]
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


def _bar(state: State) -> ProgressBar:
    """Full if the run is done, even if it ended before its last planned step."""
    steps = max(1, int(state.get("steps") or 0))
    done = steps if _name(state) == "done" else min(int(state.get("step", 0)), steps)
    return ProgressBar(total=steps, completed=done, width=WIDTH)


def _loss_curve(run: Run, state: State) -> str:
    if _name(state) != "running":
        return ""
    return sparkline(list(read_history(run.history_file).get("train/loss", {}).values()))


def _time_left_text(state: State) -> str:
    s_per_step = state.get("s_per_step")
    if not s_per_step or _name(state) not in ("running", "waiting"):
        return ""
    return format_duration(_steps_left(state) * s_per_step)


def _last_sample(run: Run) -> str:
    samples = run.sample_files()
    if not samples:
        return ""
    newest = samples[max(samples)]
    return str(newest[min(newest)])


def _steps_left(state: State) -> int:
    return max(0, int(state.get("steps") or 0) - int(state.get("step", 0)))


def _name(state: State) -> str:
    return str(state.get("state", "unknown"))


def _rank(state: State) -> int:
    return ORDER.index(_name(state)) if _name(state) in ORDER else len(ORDER)
