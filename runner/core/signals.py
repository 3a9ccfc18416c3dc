"""Asking a run to stop: signals and a deadline set a flag, and the step loop answers between steps."""

from __future__ import annotations

import datetime
import signal
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, the first SIGINT, SIGTERM or SIGHUP (where that is not ignored, as under nohup) is a request.

    `at_once`: the second one stops whatever is going on (KeyboardInterrupt); else they are counted only.
    """

    def __init__(self, deadline: datetime.datetime | None = None, *, at_once: bool = True) -> None:
        self.deadline, self.at_once = deadline, at_once
        self.signals = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:
                self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.signals += 1
        if self.at_once and self.signals > 1:
            raise KeyboardInterrupt

    @property
    def asked(self) -> int:
        """How often, the deadline counted once."""
        late = self.deadline is not None and datetime.datetime.now() >= self.deadline
        return max(self.signals, int(late))

    def __call__(self) -> bool:
        return self.asked > 0


def next_time(text: str) -> datetime.datetime:
    """The next moment the clock shows HH:MM. Raises ValueError."""
    wanted = datetime.time.fromisoformat(text)
    now = datetime.datetime.now()
    moment = now.replace(hour=wanted.hour, minute=wanted.minute, second=0, microsecond=0)
    return moment if moment > now else moment + datetime.timedelta(days=1)
