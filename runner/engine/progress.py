"""What a user sees while a queue runs, all on stderr: a live line per run on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from runner.core.events import Event
from runner.core.humanize import format_duration

PLAIN_INTERVAL = 10.0  # seconds between a run's step lines where there is no terminal


@dataclass
class RunProgress:
    """How far a run is. step_seconds: smoothed; None before the phase's first step. printed: time.monotonic() of the
    last plain line."""

    task: TaskID | None = None
    step_seconds: float | None = None
    printed: float = 0.0
    steps_left: int = 0


class Screen:
    """Prints messages, and the progress of all runs.

    later_steps: steps of the runs that have not begun. slots: how many runs train at a time. Both are for the estimate
    of when the queue ends.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.live = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[facts]}"),
            console=self.console, transient=True,
        )  # fmt: skip
        self.runs: dict[str, RunProgress] = {}
        self.later_steps, self.slots = 0, 1

    def message(self, text: str, run: str = "") -> None:
        """Print a message, which may be about a run."""
        prefix = f"{run}: " if run else ""
        self.console.print(f"{prefix}{text}", markup=False, soft_wrap=True)

    def show(self, run: str, event: Event) -> None:
        """Show an event of `runner.core.events`."""
        progress = self.runs.setdefault(run, RunProgress())
        match event:
            case {"kind": "message", "text": text}:
                self.message(text, run)
            case {"kind": "phase_started", "phase": phase, "done": done, "total": total, "unit": unit}:
                self.end_bar(run)
                progress.step_seconds, progress.printed = None, time.monotonic()
                if self.console.is_terminal:
                    self.live.start()
                    progress.task = self.live.add_task(
                        f"{run} · {phase}", total=total, completed=done, facts=f"{done}/{total} {unit}"
                    )
            case {"kind": "progress", "done": done, "total": total, "unit": unit} if progress.task is not None:
                self.live.update(progress.task, completed=done, facts=f"{done}/{total} {unit}")
            case {"kind": "step"}:
                self._show_step(run, progress, event)
            case {"kind": "phase_ended"}:
                self.end_bar(run)

    def _show_step(self, run: str, progress: RunProgress, event: Event) -> None:
        number, steps, seconds = event["number"], event["steps"], event["seconds"]
        smoothed = seconds if progress.step_seconds is None else 0.95 * progress.step_seconds + 0.05 * seconds
        progress.step_seconds, progress.steps_left = smoothed, steps - number
        facts = (
            f"step {number}/{steps}  loss {_format_loss(event['loss'])}  {smoothed:.3g} s/step"
            f"  run {format_duration(progress.steps_left * smoothed)}  queue {format_duration(self._queue_seconds(smoothed))}"
        )
        if progress.task is not None:
            self.live.update(progress.task, completed=number, facts=facts)
        elif time.monotonic() - progress.printed > PLAIN_INTERVAL or number == event["stop"]:
            progress.printed = time.monotonic()
            self.message(facts, run)

    def _queue_seconds(self, step_seconds: float) -> float:
        """Seconds until the queue ends, if all runs that have not begun take `step_seconds` per step and share the
        slots."""
        running = [run.steps_left * (run.step_seconds or step_seconds) for run in self.runs.values()]
        return max(max(running, default=0.0), (sum(running) + self.later_steps * step_seconds) / self.slots)

    def end_bar(self, run: str) -> None:
        """Remove the run's bar, and the live display with the last bar."""
        progress = self.runs.get(run)
        if progress is not None and progress.task is not None:
            self.live.remove_task(progress.task)
            progress.task = None
            if not any(other.task is not None for other in self.runs.values()):
                self.live.stop()

    def end_run(self, run: str) -> None:
        """Remove the run from the display and from the queue's estimate."""
        self.end_bar(run)
        self.runs.pop(run, None)


def _format_loss(value: Any) -> str:
    return "none yet" if value is None else f"{value:.4f}"
