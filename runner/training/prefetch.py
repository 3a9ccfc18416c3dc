"""Prepares the next batch while the device computes, as torch's DataLoader does, but with one thread and exact
indices."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")
StepIndex = tuple[int, int]  # (step, micro)


class Prefetcher(Generic[Batch]):
    """Calls `make(step, micro)` in a thread for the batch that is probably needed next.

    `make` must depend on its arguments alone, so that it does not matter when and where it runs. in_thread: False when
    training computes on the CPU itself. A second thread brings its own OpenMP workers, which wait by spinning and so
    take cores from the first one's; a step on two cores took a third longer.
    """

    def __init__(self, make: Callable[[int, int], Batch], *, in_thread: bool) -> None:
        self.make, self.in_thread = make, in_thread
        self.pool = ThreadPoolExecutor(1, "ahead")
        self.pool.submit(int)  # start the thread now: a signal during its start would leave it without an owner
        self.next: tuple[StepIndex, Future[Batch]] | None = None

    def get(self, wanted: StepIndex, then: StepIndex) -> Batch:
        """The batch for `wanted`; then begins to make the one for `then`. Raises what `make` raises."""
        prefetched, self.next = self.next, None
        batch = prefetched[1].result() if prefetched and prefetched[0] == wanted else self.make(*wanted)
        if self.in_thread:
            self.next = then, self.pool.submit(self.make, *then)
        return batch

    def close(self) -> None:
        """End the thread, after the batch that it is making."""
        self.pool.shutdown(cancel_futures=True)
        self.next = None
