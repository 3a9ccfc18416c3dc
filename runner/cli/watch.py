"""`fluxrun status --watch`: a queue's runs as they go, from their folders alone, so from any terminal. No torch."""

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
from runner.report.tables import Column, column, fitted, number_text, reasons
from runner.runs.run import Run, find_runs
from runner.tracking.history import read_history

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # of a spark line and a bar, in characters
ORDER = ("running", "waiting", "failed", "stopped", "done")
COLOURS = {"running": "cyan", "failed": "red", "stopped": "yellow", "done": "green"}


def view(runs: Path, names: Collection[str], width: int) -> Group:
    """A table of the runs (all where none is named), those that run first, below a line about the whole."""
    found = [(run, run.state()) for run in find_runs(runs) if not names or run.name in names]
    found.sort(key=lambda one: (_place(one[1]), one[0].name))
    states = [state for _, state in found]
    left = [_left(state) for state in states]
    table = fitted(
        [run.name for run, _ in found],
        [
            column("state", [Text(_name(state), style=COLOURS.get(_name(state), "")) for state in states], 0),
            Column("", [_bar(state) for state in states], WIDTH, 4),
            column("step", [f"{state.get('step', 0)}/{state.get('steps') or '?'}" for state in states], 0, right=True),
            column("loss", [number_text(state.get("train_loss"), ".4f") for state in states], 1, right=True),
            column("", [Text(_curve(run, state), style="cyan") for run, state in found], 6),
            column("s/step", [number_text(state.get("s_per_step"), ".3g") for state in states], 3, right=True),
            column("left", left, 2, right=True),
            column("last sample", [_last_sample(run) for run, _ in found], 5),
        ],
        width,
    )
    why = reasons({run.name: state.get("error") or state.get("ended") for run, state in found})
    return Group(Text(headline(runs, states)), Text(""), *table, *why)


def headline(runs: Path, states: Sequence[Mapping[str, Any]]) -> str:
    """How many runs are in which state, which slots are taken, and when all of it will be through."""
    counts = [f"{sum(_name(state) == name for state in states)} {name}" for name in ORDER]
    told = ", ".join(count for count in counts if not count.startswith("0 ")) or "no runs yet"
    slots = [
        f"{lock.name} (process {holder})"
        for lock in sorted((runs / ".slots").glob("*"))
        if (holder := locks.lock_holder(lock)) is not None
    ]
    busy = f"; slots: {', '.join(slots)}" if slots else ""
    left = time_left(states)
    return f"{told}{busy}" + ("" if left is None else f"; all done in about {format_duration(left)}")


def time_left(states: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds, for what runs or waits, the running ones side by side; None where no pace is known, or nothing is left."""
    going = [state for state in states if _name(state) == "running"]
    waiting = [state for state in states if _name(state) == "waiting"]
    paces = [state["s_per_step"] for state in going if state.get("s_per_step")]
    if not paces:
        return None
    pace: float = statistics.median(paces)
    running = [_steps_left(state) * float(state.get("s_per_step") or pace) for state in going]
    later = sum(_steps_left(state) for state in waiting) * pace
    return max(max(running), (sum(running) + later) / len(going))


def spark(values: Sequence[float], width: int = WIDTH) -> str:
    """A line of blocks, each the mean of a part of the values; "" for none."""
    if not values:
        return ""
    count = min(width, len(values))
    cuts = [len(values) * part // count for part in range(count + 1)]
    means = [statistics.fmean(values[start:stop]) for start, stop in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def _bar(state: Mapping[str, Any]) -> ProgressBar:
    """Full where the run is done, also before its last planned step."""
    steps = max(1, int(state.get("steps") or 0))
    done = steps if _name(state) == "done" else min(int(state.get("step", 0)), steps)
    return ProgressBar(total=steps, completed=done, width=WIDTH)


def _curve(run: Run, state: Mapping[str, Any]) -> str:
    if _name(state) != "running":
        return ""
    return spark(list(read_history(run.history_file).get("train/loss", {}).values()))


def _left(state: Mapping[str, Any]) -> str:
    pace = state.get("s_per_step")
    return format_duration(_steps_left(state) * pace) if pace and _name(state) in ("running", "waiting") else ""


def _last_sample(run: Run) -> str:
    samples = run.sample_files()
    if not samples:
        return ""
    newest = samples[max(samples)]
    return str(newest[min(newest)])


def _steps_left(state: Mapping[str, Any]) -> int:
    return max(0, int(state.get("steps") or 0) - int(state.get("step", 0)))


def _name(state: Mapping[str, Any]) -> str:
    return str(state.get("state", "unknown"))


def _place(state: Mapping[str, Any]) -> int:
    return ORDER.index(_name(state)) if _name(state) in ORDER else len(ORDER)
