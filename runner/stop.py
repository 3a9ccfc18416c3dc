"""Asking a run to stop: signals and a deadline set a flag, and the step loop answers between steps."""

from __future__ import annotations

import datetime
import signal
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is a request; the second stops at once (KeyboardInterrupt)."""

    def __init__(self, deadline: datetime.datetime | None = None) -> None:
        self.deadline = deadline
        self.signalled = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True

    def __call__(self) -> bool:
        late = self.deadline is not None and datetime.datetime.now() >= self.deadline
        return self.signalled or late


def next_time(text: str) -> datetime.datetime:
    """The next moment the clock shows HH:MM. Raises ValueError."""
    wanted = datetime.time.fromisoformat(text)
    now = datetime.datetime.now()
    moment = now.replace(hour=wanted.hour, minute=wanted.minute, second=0, microsecond=0)
    return moment if moment > now else moment + datetime.timedelta(days=1)
