"""Making what will be asked for next while the device computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")
StepIndex = tuple[int, int]  # (step, micro)


class Prefetcher(Generic[Made]):
    """`make` must be a function of its arguments alone, so that nothing but the time depends on who calls it when.

    Not `beside` what computes on the CPU itself: a second thread brings OpenMP workers of its own, which wait by spinning
    and so take the cores from the first one's (a step on two cores took a third longer).
    """

    def __init__(self, make: Callable[[int, int], Made], *, beside: bool) -> None:
        self.make, self.beside = make, beside
        self.pool = ThreadPoolExecutor(1, "ahead")
        self.pool.submit(int)  # starts the thread now: a signal while it starts would leave it to itself
        self.next: tuple[StepIndex, Future[Made]] | None = None

    def get(self, wanted: StepIndex, then: StepIndex) -> Made:
        """What `make` gives for `wanted`; it begins with `then`, what is likely to be wanted next."""
        waiting, self.next = self.next, None
        made = waiting[1].result() if waiting and waiting[0] == wanted else self.make(*wanted)
        if self.beside:
            self.next = then, self.pool.submit(self.make, *then)
        return made

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.next = None
