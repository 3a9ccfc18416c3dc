"""Requests to stop a run, by signal or deadline. The step loop asks for them between steps."""

from __future__ import annotations

import datetime
import signal
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGHUP (unless ignored, as under nohup) are requests to stop; calling it tells
    whether there was one.

    deadline: counts as one request once it has passed. interrupt_on_second: the second signal raises KeyboardInterrupt
    in the main thread; otherwise signals are only counted.
    """

    def __init__(self, deadline: datetime.datetime | None = None, *, interrupt_on_second: bool = True) -> None:
        self.deadline, self.interrupt_on_second = deadline, interrupt_on_second
        self.signals = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.signals += 1
        if self.interrupt_on_second and self.signals > 1:
            raise KeyboardInterrupt

    @property
    def requests(self) -> int:
        """How many requests there were."""
        late = self.deadline is not None and datetime.datetime.now() >= self.deadline
        return max(self.signals, int(late))

    def __call__(self) -> bool:
        return self.requests > 0


def next_time(text: str) -> datetime.datetime:
    """The next moment the clock shows HH:MM. Raises ValueError."""
    wanted = datetime.time.fromisoformat(text)
    now = datetime.datetime.now()
    moment = now.replace(hour=wanted.hour, minute=wanted.minute, second=0, microsecond=0)
    return moment if moment > now else moment + datetime.timedelta(days=1)
