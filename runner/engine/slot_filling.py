"""Starting runs in the slots of a queue: worker processes are started early, kept from run to run, and replaced when
lost."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from runner.core import files
from runner.core.errors import DiskError, ExitCode
from runner.core.humanize import format_bytes
from runner.engine.outcomes import finish_run
from runner.engine.queue_state import Queue, QueuedRun, SlotState
from runner.engine.slots import Slot
from runner.engine.worker import Worker
from runner.jobs.job import Job
from runner.plan.disk import SPARE, left_to_write

PREFETCHED_RUNS = 100  # waiting runs whose captions may be encoded along with a run's own


@contextmanager
def start_workers(slots: Sequence[Slot], count: int) -> Iterator[dict[int, Worker]]:
    """Workers for the first `count` slots, by the slot's index, so that they import their libraries while runs are
    checked.

    They use no GPU yet, so another queue may still hold the slots. Workers that are left in the dictionary are shut
    down at the end.
    """
    workers: dict[int, Worker] = {}
    try:
        for index, slot in enumerate(slots[:count]):
            workers[index] = Worker(slot.gpus, threads_per_worker(slots))
        yield workers
    finally:
        for worker in workers.values():
            worker.shutdown()


def threads_per_worker(slots: Sequence[Slot]) -> int | None:
    """CPU threads for each of several workers; None, torch's own choice, for a single one."""
    return max(1, (os.cpu_count() or 1) // len(slots)) if len(slots) > 1 else None


def fill_slots(queue: Queue, states: Sequence[SlotState], threads: int | None) -> None:
    """Start waiting runs, in their order, in all free slots; release the slots that no run waits for."""
    for state in states:
        if state.run is None and not queue.waiting:
            release_slot(state)
        while state.run is None and queue.waiting and _take_slot(queue, state):
            run = queue.waiting.pop(0)
            if run.job.run.take_stop_request():
                run.reason = "stopped before it began"
                finish_run(queue, run, ExitCode.STOPPED)
                continue
            try:
                _check_free_space(run.job)
            except DiskError as error:
                run.reason = str(error)
                finish_run(queue, run, ExitCode.DISK)
                continue
            _start_run(queue, state, run, threads)


def _take_slot(queue: Queue, state: SlotState) -> bool:
    """Whether the slot is this queue's now. That another queue holds it is reported once."""
    if state.slot.take():
        state.reported_busy = False
        return True
    shut_down_worker(state)  # the other queue may hold it for hours
    if not state.reported_busy:
        state.reported_busy = True
        queue.screen.message(f"waiting for {state.slot.title}, which process {state.slot.holder() or 'unknown'} uses")
    return False


def _check_free_space(job: Job) -> None:
    """Raises DiskError where the disk has no room for what the run will write by its plan, or the run's folder is
    gone."""
    if gone := job.run.missing_message():
        raise DiskError(gone)
    folder = job.run.folder
    free = files.DISK.free(folder)
    needed = left_to_write(folder, job.plan.disk_bytes) + SPARE
    if free < needed:
        raise DiskError(
            f"the run needs about {format_bytes(needed)}, of which {format_bytes(SPARE)} must stay free, and {folder} has room for "
            f"{format_bytes(free)}; free some space, then the same command goes on"
        )


def _start_run(queue: Queue, state: SlotState, run: QueuedRun, threads: int | None) -> None:
    run.begin_attempt(on_gpu=state.slot.gpus not in (None, "cpu"))
    queue.screen.later_steps = sum(other.job.plan.steps for other in queue.waiting)
    state.run = run
    if state.worker is not None and not state.worker.accepts_runs:  # it died while idle
        shut_down_worker(state)
    if state.worker is None:
        state.worker = Worker(state.slot.gpus, threads)
    upcoming = [other.job.run.folder for other in queue.waiting[:PREFETCHED_RUNS]]
    state.worker.submit(run.job.run.folder, run.attempt, upcoming)


def shut_down_worker(state: SlotState) -> None:
    worker, state.worker = state.worker, None
    if worker is not None:
        worker.shutdown()


def release_slot(state: SlotState) -> None:
    """Shut the slot's worker down and let other queues use the slot."""
    shut_down_worker(state)
    state.slot.release()
