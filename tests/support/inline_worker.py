"""A queue's worker in the test's own process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class InlineWorker:
    """A worker that trains in this process: the same code, without the start of a process for every test."""

    accepts_runs = True

    def __init__(self, gpus: str | None, threads: int | None) -> None:
        self.gpus = gpus
        self.state: Any = None  # a WorkerState, which imports torch

    def submit(self, folder: Path, attempt: int, upcoming: Sequence[Path]) -> None:
        self.exit_code: int | None = None
        self.request = folder, attempt, tuple(upcoming)

    def read_events(self) -> list[Any]:
        from runner.core.signals import StopRequest
        from runner.engine.worker_main import TrainRequest, WorkerState, train_run

        self.state = self.state or WorkerState()
        events: list[Any] = []
        with StopRequest() as stop:
            self.exit_code = train_run(TrainRequest(*self.request), self.gpus, events.append, stop, self.state)
        return events

    def shutdown(self) -> None:
        """Nothing to end."""
