"""A run's messages and progress: into its log file, and as events for the display (`runner.engine.progress`).

Events are JSON objects. Their `kind`: message, phase_started, progress, step and phase_ended, as the methods of
`EventLog` send them; and from the worker process itself run_done, and run_ended for every other end, with its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runner.core.files import ignore_disk_errors

Event = Mapping[str, Any]


class EventLog:
    """Sends one run's events and writes its log. Each event also shows the queue that the worker is alive."""

    def __init__(self, send: Callable[[Event], None] = lambda _: None, log_file: Path | None = None) -> None:
        self.send, self.log_file = send, log_file

    def message(self, text: str) -> None:
        """Show one line to the user and write it into the log."""
        self.log(text)
        self.send({"kind": "message", "text": text})

    def log(self, text: str) -> None:
        """Write text into the log only. Disk errors are ignored."""
        if self.log_file is None:
            return
        with ignore_disk_errors(), self.log_file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def begin_phase(self, phase: str, done: int, total: int, unit: str) -> None:
        """Start a progress bar. `unit`: what is counted, e.g. steps; `done`: how many of `total` are done already."""
        self.send({"kind": "phase_started", "phase": phase, "done": done, "total": total, "unit": unit})

    def end_phase(self) -> None:
        self.send({"kind": "phase_ended"})

    def progress(self, done: int, total: int, unit: str) -> None:
        self.send({"kind": "progress", "done": done, "total": total, "unit": unit})

    def step(self, number: int, smoothed: float | None, seconds: float, phase_stop: int, steps: int) -> None:
        """A training step is done. smoothed: loss; seconds: of this step; phase_stop: the phase's last step; steps: of
        the run."""
        self.send({
            "kind": "step", "number": number, "loss": smoothed, "seconds": seconds, "stop": phase_stop, "steps": steps,
        })  # fmt: skip
