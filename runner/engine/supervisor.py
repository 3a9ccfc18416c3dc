"""The queue's loop: it keeps the slots filled, follows each worker's events, and ends when no run is left.

Runs train in worker processes (`runner.engine.worker`), so nothing that goes wrong in one reaches the queue or other
runs. Subjects have their own files: `queue_state` what the queue knows, `slot_filling` how a run starts, `outcomes`
what happens after it ended, `run_records` what is written down, `notifications` what is sent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from runner.core.errors import ExitCode
from runner.core.signals import StopRequest
from runner.engine.notifications import notify_queue_end
from runner.engine.outcomes import handle_worker_exit
from runner.engine.progress import Screen
from runner.engine.queue_state import Queue, QueuedRun, SlotState
from runner.engine.run_records import add_run, release_waiting_runs
from runner.engine.slot_filling import fill_slots, release_slot, shut_down_worker, threads_per_worker
from runner.engine.slots import Slot
from runner.engine.worker import Worker
from runner.jobs.job import Job
from runner.report.publish import preload, publish
from runner.runs.index import write_index

POLL_INTERVAL = 0.05  # seconds between looks at the workers
# A worker hangs when it sends no event between two training steps for both of these.
HANG_SECONDS = 600.0
HANG_STEPS = 50  # times the slowest step so far


def run_queue(
    jobs: Sequence[Job], runs_folder: Path, slots: Sequence[Slot], screen: Screen, stop: StopRequest, *,
    retries: int, fail_fast: bool, workers: dict[int, Worker] | None = None,
) -> int:  # fmt: skip
    """Run all jobs, in their order, and return the exit code: 0 all done, 1 some failed, 3 some stopped, paused or not
    started.

    retries: tries after a crash, per run. workers: already started workers by the slot's index (`start_workers`); those
    that are used are taken out.
    """
    queue = Queue(screen, runs_folder, retries, fail_fast, disk_id=runs_folder.stat().st_dev)
    states = [SlotState(slot, workers.pop(index, None) if workers else None) for index, slot in enumerate(slots)]
    for job in jobs:
        add_run(queue, job)
    write_index(runs_folder)
    preload()  # while the workers import their libraries
    try:
        _loop(queue, states, stop)
    finally:
        for state in states:
            release_slot(state)
        release_waiting_runs(queue)
        _publish(queue)
        notify_queue_end(queue)
    return 1 if queue.failed else 3 if queue.unfinished else 0


def _loop(queue: Queue, states: Sequence[SlotState], stop: StopRequest) -> None:
    """Until no run is left; once the queue is halted, until no run trains."""
    threads, forwarded = threads_per_worker([state.slot for state in states]), 0
    while queue.waiting or any(state.run for state in states):
        if stop() and not queue.halt_reason:
            queue.halt_reason = "stopped before it began"
        if queue.is_runs_folder_gone():
            queue.halt_reason = "the runs folder is gone"
        if queue.halt_reason and not any(state.run for state in states):
            return
        requests = max(stop.requests, int(queue.fail_fast and queue.failed))
        for number in range(forwarded + 1, requests + 1):
            _forward_stop_request(states, number)
        forwarded = max(forwarded, requests)
        if not queue.halt_reason:
            fill_slots(queue, states, threads)
        active = [_poll_slot(queue, state) for state in states]
        if not any(active):
            time.sleep(POLL_INTERVAL)


def _forward_stop_request(states: Sequence[SlotState], number: int) -> None:
    """The first request lets workers save and stop, the second stops them at once, the third kills them."""
    for state in states:
        if state.run and state.worker:
            if number > 2:
                state.worker.kill()
            else:
                state.worker.request_stop()


def _poll_slot(queue: Queue, state: SlotState) -> bool:
    """Handle what the slot's worker has sent, and the end of its run. False where nothing happened."""
    run, worker = state.run, state.worker
    if run is None or worker is None:
        return False
    events = worker.read_events()
    for event in events:
        run.note_event(event)
        queue.screen.show(run.name, event)
    if worker.exit_code is None:
        _kill_if_hung(queue, run, worker)
        return bool(events)
    state.run = None
    queue.screen.end_run(run.name)
    if worker.exit_code != ExitCode.DONE:
        shut_down_worker(state)  # the next run gets a fresh process
    handle_worker_exit(queue, run, worker.exit_code)
    return True


def _kill_if_hung(queue: Queue, run: QueuedRun, worker: Worker) -> None:
    """Kill a worker that has been silent between two steps for much longer than a step takes."""
    if run.slowest_step is None or run.hung:
        return
    silence = time.monotonic() - run.last_event
    if silence > max(HANG_SECONDS, HANG_STEPS * run.slowest_step):
        run.hung = True
        queue.screen.message(
            f"the training process has shown no sign of life for {silence:.0f} s and is killed", run.name
        )
        worker.kill()


def _publish(queue: Queue) -> None:
    """Write the results page, or report that the runs folder is gone."""
    if queue.is_runs_folder_gone():
        queue.screen.message(
            f"stopped: the runs folder {queue.runs_folder} is gone: it was removed or renamed, or its disk was taken away; "
            "nothing more was written there; put it back and the same command goes on, or else begins anew"
        )
    else:
        publish(queue.runs_folder, queue.screen.message)
