"""`fluxrun status --watch`: a queue's runs as they go, from their folders alone, so from any terminal. No torch."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from runner import files
from runner.clock import clock
from runner.rundir import Run, find_runs
from runner.series import read_history

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # of a spark line and a bar, in characters
ORDER = ("running", "waiting", "failed", "stopped", "done")
COLOURS = {"running": "cyan", "failed": "red", "stopped": "yellow", "done": "green"}


def view(runs: Path, names: Collection[str]) -> Group:
    """A table of the runs (all where none is named), those that run first, below a line about the whole."""
    found = [(run, run.state()) for run in find_runs(runs) if not names or run.name in names]
    found.sort(key=lambda one: (_place(one[1]), one[0].name))
    table = Table(box=box.SIMPLE)
    for title in ("run", "state", "", "step", "loss", "", "s/step", "left", "last sample, or why"):
        table.add_column(title, no_wrap=title != "last sample, or why")
    for run, state in found:
        table.add_row(*_row(run, state))
    return Group(Text(headline(runs, [state for _, state in found])), table)


def headline(runs: Path, states: Sequence[Mapping[str, Any]]) -> str:
    """How many runs are in which state, which slots are taken, and when all of it will be through."""
    counts = [f"{sum(_name(state) == name for state in states)} {name}" for name in ORDER]
    told = ", ".join(count for count in counts if not count.startswith("0 ")) or "no runs yet"
    slots = [
        f"{lock.name} (process {holder})"
        for lock in sorted((runs / ".slots").glob("*"))
        if (holder := files.lock_holder(lock)) is not None
    ]
    busy = f"; slots: {', '.join(slots)}" if slots else ""
    left = time_left(states)
    return f"{told}{busy}" + ("" if left is None else f"; all done in about {clock(left)}")


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


def _row(run: Run, state: Mapping[str, Any]) -> tuple[Any, ...]:
    name, step, steps = _name(state), int(state.get("step", 0)), int(state.get("steps") or 0)
    pace, loss = state.get("s_per_step"), state.get("train_loss")
    losses = list(read_history(run.history_file).get("train/loss", {}).values()) if name == "running" else []
    left = clock(_steps_left(state) * pace) if pace and name in ("running", "waiting") else ""
    return (
        Text(run.name), Text(name, style=COLOURS.get(name, "")),
        ProgressBar(total=max(1, steps), completed=min(step, max(1, steps)), width=WIDTH), Text(f"{step}/{steps or '?'}"),
        Text("" if loss is None else f"{loss:.4f}"), Text(spark(losses), style="cyan"),
        Text(f"{pace:.3g}" if pace else ""), Text(left), Text(str(state.get("error") or _last_sample(run))),
    )  # fmt: skip


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
