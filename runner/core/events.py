"""What a run tells while it runs: into its own log, and as events to whoever shows them (`runner.engine.progress`). No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runner.core.files import ignore_disk_errors

Event = Mapping[str, Any]  # JSON; "say" names its kind


class EventLog:
    """One run's voice. Every call is a sign of life, too."""

    def __init__(self, send: Callable[[Event], None] = lambda _: None, log_file: Path | None = None) -> None:
        self.send, self.log_file = send, log_file

    def line(self, text: str) -> None:
        """One line for the user and for the run's log."""
        self.log(text)
        self.send({"say": "line", "text": text})

    def log(self, text: str) -> None:
        if self.log_file is None:
            return
        with ignore_disk_errors(), self.log_file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def begin_phase(self, phase: str, done: int, total: int, unit: str) -> None:
        """A bar of `total` steps, pictures or captions, `done` of them already."""
        self.send({"say": "phase", "phase": phase, "done": done, "total": total, "unit": unit})

    def end_phase(self) -> None:
        self.send({"say": "end"})

    def progress(self, done: int, total: int, unit: str) -> None:
        self.send({"say": "progress", "done": done, "total": total, "unit": unit})

    def step(self, number: int, smoothed: float | None, seconds: float, phase_stop: int, steps: int) -> None:
        """`seconds`: the step's own; `steps`: the run's."""
        self.send({
            "say": "step", "number": number, "loss": smoothed, "seconds": seconds, "stop": phase_stop, "steps": steps,
        })  # fmt: skip
