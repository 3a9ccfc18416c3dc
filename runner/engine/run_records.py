"""What a queue writes about its runs: their states, their leases and the results index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from runner.core.errors import FluxrunError, LockHeldError, is_disk_error
from runner.engine.queue_state import Queue, QueuedRun
from runner.jobs.job import Job
from runner.runs.claim import claim_run
from runner.runs.index import write_index
from runner.runs.inputs import read_inputs


def add_run(queue: Queue, job: Job) -> None:
    """Claim a run's folder for this queue and let the run wait; one that cannot be claimed is reported and left out."""
    run = QueuedRun(job)
    try:
        run.attempt = claim_run(
            job.run,
            job.spec,
            job.plan,
            version("fluxrun"),
            job.source.origin,
            lambda: read_inputs(job.spec, job.pictures),
        )
    except FluxrunError as error:
        queue.screen.message(f"not run: {error}", run.name)
        queue.unfinished |= isinstance(error, LockHeldError)
        queue.failed |= not isinstance(error, LockHeldError)
    except OSError as error:
        if not is_disk_error(error):
            raise
        queue.screen.message(f"not run: {error}", run.name)
        queue.unfinished = True
    else:
        run.micro_batch_parts = job.run.micro_batch_parts(job.spec.train.batch_size)
        queue.waiting.append(run)


def record_state(queue: Queue, run: QueuedRun, state: str, reason: str) -> None:
    """Write the run's state, unless another process has taken the run over."""
    if run.job.run.lost_lease():
        return
    with report_disk_errors(queue, run):
        run.job.run.write_outcome(state, reason, split=run.micro_batch_parts if run.micro_batch_parts > 1 else None)
        update_index(queue)


def release_run(queue: Queue, run: QueuedRun) -> None:
    """Give up this queue's lease, so that others may work on the run."""
    with report_disk_errors(queue, run):
        run.job.run.release()
        update_index(queue)


def release_waiting_runs(queue: Queue) -> None:
    """Record the runs that were not started, or not started again, as stopped, and release them."""
    for run in queue.waiting:
        queue.unfinished = True
        record_state(queue, run, "stopped", queue.halt_reason or "not begun")
        release_run(queue, run)


def update_index(queue: Queue) -> None:
    if not queue.is_runs_folder_gone():
        write_index(queue.runs_folder)


@contextmanager
def report_disk_errors(queue: Queue, run: QueuedRun) -> Iterator[None]:
    """Report a disk error on the screen and go on, since a full disk must not end the queue.

    A folder that is gone is not reported here: its run or the end of the queue says so.
    """
    try:
        yield
    except OSError as error:
        if run.job.run.missing_message() or queue.is_runs_folder_gone():
            return
        if not is_disk_error(error):
            raise
        queue.screen.message(f"the state could not be written: {error}", run.name)
