"""What a queue knows while it runs: about each run, each slot, and itself."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from runner.core.events import Event
from runner.core.notify import Target
from runner.engine.progress import Screen
from runner.engine.slots import Slot
from runner.engine.worker import Worker
from runner.jobs.job import Job


@dataclass
class QueuedRun:
    """One run of the queue, and how its current or last attempt went.

    retries: how often this queue tried the run again after a crash. idle_attempts: crashed attempts in a row that saved
    no new step. first_step: newest checkpoint when the attempt began. last_event: time.monotonic() of the worker's last
    event. slowest_step: seconds of the slowest step in the current training phase; None outside one. reason: why the
    attempt ended.
    """

    job: Job
    attempt: int = 0
    retries: int = 0
    idle_attempts: int = 0
    first_step: int = 0
    micro_batch_parts: int = 1
    last_event: float = 0.0
    slowest_step: float | None = None
    hung: bool = False
    on_gpu: bool = False
    reason: str = ""

    @property
    def name(self) -> str:
        return self.job.plan.name

    def begin_attempt(self, *, on_gpu: bool) -> None:
        """Forget what is known of the attempt before."""
        self.first_step, self.reason = self.newest_checkpoint(), ""
        self.last_event, self.slowest_step, self.hung = time.monotonic(), None, False
        self.on_gpu = on_gpu

    def note_event(self, event: Event) -> None:
        """Keep what an event of `runner.core.events` says about the attempt."""
        self.last_event = time.monotonic()
        if event["kind"] == "step":
            self.slowest_step = max(self.slowest_step or 0.0, event["seconds"])
        elif event["kind"] == "phase_ended":
            self.slowest_step = None
        elif event["kind"] == "run_ended":
            self.reason = event["reason"]

    def newest_checkpoint(self) -> int:
        """Its step; 0 where there is none."""
        return max((step for step, _ in self.job.run.checkpoint_files()), default=0)


@dataclass
class SlotState:
    """A slot, the worker process started for it, and the run that the worker trains.

    reported_busy: the user was told that another queue holds the slot.
    """

    slot: Slot
    worker: Worker | None = None
    run: QueuedRun | None = None
    reported_busy: bool = False


@dataclass
class Queue:
    """The queue as a whole.

    failed: some run failed. unfinished: some run was stopped, paused or not started. halt_reason: why no further run is
    started; "" while runs are. similar_failures: signatures of the last failures in a row, all equal. disk_id: st_dev
    of the disk that holds the runs folder. notifier: sends notifications one after the other, outside the queue's
    thread.
    """

    screen: Screen
    runs_folder: Path
    max_retries: int
    fail_fast: bool
    disk_id: int
    waiting: list[QueuedRun] = field(default_factory=list)
    similar_failures: list[str] = field(default_factory=list)
    failed: bool = False
    unfinished: bool = False
    halt_reason: str = ""
    notify_targets: dict[Target, None] = field(default_factory=dict)
    notifier: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "notify"))

    def is_runs_folder_gone(self) -> bool:
        """Whether it was removed or renamed, or its disk was unmounted, which leaves an empty folder of another
        disk."""
        try:
            return self.runs_folder.stat().st_dev != self.disk_id
        except OSError:
            return True
