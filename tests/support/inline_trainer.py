"""The queue's trainer in the test's own process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class InlineTrainer:
    """A queue's trainer without a process of its own: the same code here, which spares every test the start of one."""

    def __init__(self, gpus: str | None, threads: int | None) -> None:
        self.gpus = gpus
        self.warm: Any = None  # which imports torch

    def order(self, folder: Path, attempt: int, later: Sequence[Path]) -> None:
        self.code: int | None = None
        self.told = folder, attempt, tuple(later)

    def poll(self) -> list[Any]:
        from runner.core.signals import StopRequest
        from runner.engine.worker_main import TrainRequest, WorkerState, train_run

        self.warm = self.warm or WorkerState()
        events: list[Any] = []
        with StopRequest() as stop:
            self.code = train_run(TrainRequest(*self.told), self.gpus, events.append, stop, self.warm)
        return events

    lives = True

    def dismiss(self) -> None:
        """Nothing to end."""
