"""Every line a user sees while a queue runs: a live line per run on a terminal, plain lines elsewhere; all on stderr. No torch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from runner.core.events import Event
from runner.core.humanize import format_duration

PLAIN_EVERY = 10.0  # seconds between a run's step lines where there is no terminal


@dataclass
class Row:
    """What is known of a run that runs. `pace`: seconds per step, smoothed; None before the first."""

    task: TaskID | None = None
    pace: float | None = None
    told: float = 0.0
    left: int = 0


class Screen:
    """`later_steps`: of the runs that have not begun, for the queue's finishing time."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.live = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[facts]}"),
            console=self.console, transient=True,
        )  # fmt: skip
        self.rows: dict[str, Row] = {}
        self.later_steps, self.slots = 0, 1

    def line(self, text: str, run: str = "") -> None:
        where = f"{run}: " if run else ""
        self.console.print(f"{where}{text}", markup=False, soft_wrap=True)

    def show(self, run: str, event: Event) -> None:
        """What `runner.core.events` sent."""
        row = self.rows.setdefault(run, Row())
        match event:
            case {"say": "line", "text": text}:
                self.line(text, run)
            case {"say": "phase", "phase": phase, "done": done, "total": total, "unit": unit}:
                self.end_bar(run)
                row.pace, row.told = None, time.monotonic()
                if self.console.is_terminal:
                    self.live.start()
                    row.task = self.live.add_task(
                        f"{run} · {phase}", total=total, completed=done, facts=f"{done}/{total} {unit}"
                    )
            case {"say": "progress", "done": done, "total": total, "unit": unit} if row.task is not None:
                self.live.update(row.task, completed=done, facts=f"{done}/{total} {unit}")
            case {"say": "step"}:
                self._step(run, row, event)
            case {"say": "end"}:
                self.end_bar(run)

    def _step(self, run: str, row: Row, event: Event) -> None:
        number, steps, seconds = event["number"], event["steps"], event["seconds"]
        row.pace = seconds if row.pace is None else 0.95 * row.pace + 0.05 * seconds
        row.left = steps - number
        facts = (
            f"step {number}/{steps}  loss {_loss(event['loss'])}  {row.pace:.3g} s/step  run {format_duration(row.left * row.pace)}"
            f"  queue {format_duration(self._queue_left(row.pace))}"
        )
        if row.task is not None:
            self.live.update(row.task, completed=number, facts=facts)
        elif time.monotonic() - row.told > PLAIN_EVERY or number == event["stop"]:
            row.told = time.monotonic()
            self.line(facts, run)

    def _queue_left(self, pace: float) -> float:
        """Runs that have not begun are taken to go at this run's pace, shared among the slots."""
        running = [row.left * (row.pace or pace) for row in self.rows.values()]
        return max(max(running, default=0.0), (sum(running) + self.later_steps * pace) / self.slots)

    def end_bar(self, run: str) -> None:
        row = self.rows.get(run)
        if row is not None and row.task is not None:
            self.live.remove_task(row.task)
            row.task = None
            if not any(other.task is not None for other in self.rows.values()):
                self.live.stop()

    def end_run(self, run: str) -> None:
        self.end_bar(run)
        self.rows.pop(run, None)


def _loss(value: Any) -> str:
    return "none yet" if value is None else f"{value:.4f}"
