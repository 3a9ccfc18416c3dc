"""Every line a user sees while it runs: one live line on a terminal, plain lines elsewhere; all of it on stderr."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from runner.clock import clock
from runner.train import Step


def _loss(step: Step) -> str:
    return "none yet" if step.smoothed is None else f"{step.smoothed:.4f}"


PLAIN_EVERY = 10.0  # seconds between step lines where there is no terminal


class Say:
    """One for the whole queue. `later_steps` are those of the runs still to come, for the queue's finishing time."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self.live = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[facts]}"),
            console=self.console, transient=True,
        )  # fmt: skip
        self.task: TaskID | None = None
        self.log_file: Path | None = None
        self.run = ""
        self.later_steps = 0
        self._last_plain = 0.0
        self._pace: float | None = None

    def line(self, text: str) -> None:
        """One line for the user and for the run's log."""
        self.log(text)
        where = f"{self.run}: " if self.run else ""
        self.console.print(f"{where}{text}", markup=False, soft_wrap=True)

    def log(self, text: str) -> None:
        if self.log_file is not None:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def begin_run(self, name: str, log_file: Path, later_steps: int) -> None:
        self.run, self.log_file, self.later_steps = name, log_file, later_steps

    def end_run(self) -> None:
        self.end_phase()
        self.run, self.log_file = "", None

    def begin_phase(self, phase: str, done: int, total: int, unit: str) -> None:
        """A bar of `total` steps, pictures or captions, `done` of them already."""
        self.end_phase()
        self._pace, self._last_plain = None, time.monotonic()
        if self.console.is_terminal:
            self.live.start()
            self.task = self.live.add_task(
                f"{self.run} · {phase}", total=total, completed=done, facts=f"{done}/{total} {unit}"
            )

    def end_phase(self) -> None:
        if self.task is not None:
            self.live.remove_task(self.task)
            self.live.stop()
            self.task = None

    def progress(self, done: int, total: int, unit: str) -> None:
        if self.task is not None:
            self.live.update(self.task, completed=done, facts=f"{done}/{total} {unit}")

    def step(self, step: Step, phase_stop: int, run_steps: int) -> None:
        self._pace = step.seconds if self._pace is None else 0.95 * self._pace + 0.05 * step.seconds
        run_left = (run_steps - step.number) * self._pace
        facts = (
            f"step {step.number}/{run_steps}  loss {_loss(step)}  {self._pace:.3g} s/step  run {clock(run_left)}"
            f"  queue {clock(run_left + self.later_steps * self._pace)}"
        )
        if self.task is not None:
            self.live.update(self.task, completed=step.number, facts=facts)
        elif time.monotonic() - self._last_plain > PLAIN_EVERY or step.number == phase_stop:
            self._last_plain = time.monotonic()
            print(f"{self.run}: {facts}", file=sys.stderr, flush=True)
        if step.number == phase_stop:
            self.log(facts)
