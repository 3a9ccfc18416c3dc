"""The supervisor: runs of a queue on this machine's slots, each in a trainer process that may die without harm. No torch."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from runner.core import files
from runner.core.errors import DiskError, ExitCode, FluxrunError, LockHeldError, is_disk_error
from runner.core.events import Event
from runner.core.humanize import format_bytes
from runner.core.notify import Target, send
from runner.core.signals import StopRequest
from runner.engine.progress import Screen
from runner.engine.slots import Slot
from runner.engine.worker import Worker
from runner.jobs.card_fit import less_memory
from runner.jobs.job import Job
from runner.plan.disk import SPARE, left_to_write
from runner.report.publish import preload, publish
from runner.runs.index import write_index
from runner.runs.inputs import read_inputs

IDLE_ATTEMPTS = 3  # in a row without a newly saved step, then a crashing run is given up
# runs in a row that fail alike, then the queue stops: a broken driver should not burn the whole night
SAME_FAILURES = 3
HANG_FLOOR = 600.0  # seconds without a sign of life in a training phase, at least, before a trainer is taken for stuck
HANG_STEPS = 50  # the same in steps, of the slowest so far
TICK = 0.05  # seconds between looks at the trainers

PREFETCHED_RUNS = 100  # waiting runs whose captions a run's encoders may read as well
Start = Callable[[str | None, int | None], Worker]


@dataclass
class QueuedRun:
    """One run of the queue. `retries`: tries after a crash so far; `idle`: attempts in a row that saved no new step."""

    job: Job
    attempt: int = 0
    retries: int = 0
    idle: int = 0
    saved: int = 0
    split: int = 1
    heard: float = 0.0
    slowest: float | None = None  # seconds of a step in this attempt
    hung: bool = False
    on_gpu: bool = False  # where it is, or was last
    reason: str = ""  # why the last attempt ended, as the trainer said it

    @property
    def name(self) -> str:
        return self.job.plan.name


@dataclass
class SlotState:
    """A slot, the trainer that is warm there, and the run it trains. `told`: that another queue has the slot."""

    slot: Slot
    trainer: Worker | None = None
    work: QueuedRun | None = None
    told: bool = False


@dataclass
class Queue:
    """What a queue knows while it runs. `left`: something ended or waits without being done."""

    screen: Screen
    runs: Path
    retries: int
    fail_fast: bool
    waiting: list[QueuedRun] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)
    failed: bool = False
    left: bool = False
    halted: str = ""  # why nothing more is started
    disk: int = 0  # number of the disk that the runs folder lies on
    targets: dict[Target, None] = field(default_factory=dict)
    teller: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "notify"))


@contextmanager
def warmed(slots: Sequence[Slot], count: int) -> Iterator[dict[int, Worker]]:
    """Trainers for as many runs, by the slot's number, which have begun to import their libraries: no more than that, so the
    slots need not be this queue's yet. Those that nobody has taken out of the dictionary go at the end."""
    warm: dict[int, Worker] = {}
    try:
        for number, slot in enumerate(slots[:count]):
            warm[number] = Worker(slot.gpus, threads_of(slots))
        yield warm
    finally:
        for trainer in warm.values():
            trainer.dismiss()


def threads_of(slots: Sequence[Slot]) -> int | None:
    """For each of several, its share of the cores."""
    return max(1, (os.cpu_count() or 1) // len(slots)) if len(slots) > 1 else None


def run_queue(
    jobs: Sequence[Job], runs: Path, slots: Sequence[Slot], screen: Screen, stop: StopRequest, *,
    retries: int, fail_fast: bool, start: Start | None = None, warm: dict[int, Worker] | None = None,
) -> int:  # fmt: skip
    """The exit code: 0 all done, 1 some failed, 3 stopped or paused with work left. `start`: tests run trainers inline;
    `warm`: trainers that are there already, by their slot's number."""
    queue = Queue(screen, runs, retries, fail_fast, disk=runs.stat().st_dev)
    places = [SlotState(slot, warm.pop(number, None) if warm else None) for number, slot in enumerate(slots)]
    for job in jobs:
        _enlist(queue, job)
    write_index(runs)
    preload()  # while warm trainers do the same
    threads, asked = threads_of(slots), 0
    try:
        while queue.waiting or any(place.work for place in places):
            if stop() and not queue.halted:
                queue.halted = "stopped before it began"
            if _is_gone(queue):
                queue.halted = "the runs folder is gone"
            if queue.halted and not any(place.work for place in places):
                break
            for _ in range(asked, max(stop.asked, int(queue.fail_fast and queue.failed))):
                asked += 1
                for place in places:
                    if place.work and place.trainer:
                        place.trainer.kill() if asked > 2 else place.trainer.ask()
            if not queue.halted:
                _fill(queue, places, threads, start or Worker)
            if not sum(_look(queue, place) for place in places):
                time.sleep(TICK)
    finally:
        for place in places:
            _clear(place)
        _leave(queue)
        if _is_gone(queue):
            screen.line(
                f"stopped: the runs folder {runs} is gone: it was removed or renamed, or its disk was taken away; nothing more was "
                "written there; put it back and the same command goes on, or else begins anew"
            )
        else:
            publish(runs, screen.line)
        _tell_the_end(queue)
    return 1 if queue.failed else 3 if queue.left else 0


def _is_gone(queue: Queue) -> bool:
    """Whether the runs folder was removed or renamed, or its disk was taken away, so that an empty folder is left."""
    try:
        return queue.runs.stat().st_dev != queue.disk
    except OSError:
        return True


def _write_index(queue: Queue) -> None:
    if not _is_gone(queue):
        write_index(queue.runs)


def _enlist(queue: Queue, job: Job) -> None:
    work = QueuedRun(job)
    try:
        work.attempt = job.run.claim(
            job.spec, job.plan, version("fluxrun"), job.source.origin, lambda: read_inputs(job.spec, job.pictures)
        )
    except FluxrunError as error:
        queue.screen.line(f"not run: {error}", work.name)
        queue.left |= isinstance(error, LockHeldError)
        queue.failed |= not isinstance(error, LockHeldError)
    except OSError as error:
        if not is_disk_error(error):
            raise
        queue.screen.line(f"not run: {error}", work.name)
        queue.left = True
    else:
        work.split = job.run.micro_batch_parts(job.spec.train.batch_size)
        queue.waiting.append(work)


def _fill(queue: Queue, places: Sequence[SlotState], threads: int | None, start: Start) -> None:
    """Give every free place a run, in their order; what no run waits for is given back."""
    for place in places:
        if place.work is None and not queue.waiting:
            _clear(place)
        while place.work is None and queue.waiting and _taken(queue, place):
            work = queue.waiting.pop(0)
            if work.job.run.take_stop_request():
                work.reason = "stopped before it began"
                _end(queue, work, ExitCode.STOPPED)
                continue
            try:
                _make_sure_of_room(work.job)
            except DiskError as error:
                work.reason = str(error)
                _end(queue, work, ExitCode.DISK)
                continue
            _begin(queue, place, work, threads, start)


def _taken(queue: Queue, place: SlotState) -> bool:
    """Whether the slot is this queue's. That another queue has it is said once."""
    if place.slot.take():
        place.told = False
        return True
    _dismiss(place)  # which may take long to come
    if not place.told:
        place.told = True
        queue.screen.line(f"waiting for {place.slot.title}, which process {place.slot.user() or 'unknown'} uses")
    return False


def _begin(queue: Queue, place: SlotState, work: QueuedRun, threads: int | None, start: Start) -> None:
    run = work.job.run
    work.saved, work.reason = _newest(work), ""
    work.heard, work.slowest, work.hung = time.monotonic(), None, False
    queue.screen.later_steps = sum(other.job.plan.steps for other in queue.waiting)
    place.work, work.on_gpu = work, place.slot.gpus not in (None, "cpu")
    if place.trainer is not None and not place.trainer.lives:  # killed while it waited
        _dismiss(place)
    later = [other.job.run.folder for other in queue.waiting[:PREFETCHED_RUNS]]
    if place.trainer is None:
        place.trainer = start(place.slot.gpus, threads)
    place.trainer.order(run.folder, work.attempt, later)


def _look(queue: Queue, place: SlotState) -> bool:
    """Hear what a place's trainer says, and whether its run has ended. True where there was something."""
    work, trainer = place.work, place.trainer
    if work is None or trainer is None:
        return False
    events = trainer.poll()
    for event in events:
        _heard(work, event)
        queue.screen.show(work.name, event)
    if trainer.code is None:
        _unstick(queue, work, trainer)
        return bool(events)
    place.work = None
    queue.screen.end_run(work.name)
    if trainer.code != ExitCode.DONE:
        _dismiss(place)  # whatever it was, nothing of it shall reach the next run
    _ended(queue, work, trainer.code)
    return True


def _heard(work: QueuedRun, event: Event) -> None:
    work.heard = time.monotonic()
    if event["say"] == "step":
        work.slowest = max(work.slowest or 0.0, event["seconds"])
    elif event["say"] == "end":
        work.slowest = None
    elif event["say"] == "ended":
        work.reason = event["reason"]


def _unstick(queue: Queue, work: QueuedRun, trainer: Worker) -> None:
    """Kill a trainer that has shown no sign of life between two steps for much longer than a step takes."""
    if work.slowest is None or work.hung:
        return
    silent = time.monotonic() - work.heard
    if silent > max(HANG_FLOOR, HANG_STEPS * work.slowest):
        work.hung = True
        queue.screen.line(f"no sign of life for {silent:.0f} s; the trainer is killed", work.name)
        trainer.kill()


def _ended(queue: Queue, work: QueuedRun, code: int) -> None:
    """What becomes of a run whose trainer has ended with `code`."""
    if code != ExitCode.DONE and (gone := work.job.run.missing_message()):
        code, work.reason = ExitCode.DISK, gone
    elif code not in (ExitCode.DONE, ExitCode.HELD) and (held := work.job.run.lost_lease()):
        code, work.reason = ExitCode.HELD, str(held)
    if code in (-signal.SIGTERM, -signal.SIGINT):  # it was asked before it could answer
        code, work.reason = ExitCode.STOPPED, work.reason or "stopped before it began"
    if code == ExitCode.MEMORY and work.split == 1 and (split := _smaller(work)):
        work.split = split
        batch, times = work.job.spec.train.batch_size // split, work.job.spec.train.accumulate * split
        _again(queue, work, f"{work.reason}; trying again with {batch} a micro-batch and {times} of them to a step")
    elif code in set(ExitCode) - {ExitCode.CRASHED, ExitCode.UNREACHABLE}:
        _end(queue, work, code)
    else:
        _crashed(queue, work, code)


# What is said of a failure, by how the trainer ended: whether the same command would meet it again.
NEXT_TRY = "; the same command tries again from the last checkpoint"
NEXT: dict[int, str] = {
    ExitCode.FAILED: "; once that is put right, the same command goes on from the last checkpoint",
    ExitCode.NOT_FINITE: "; the same command would end the same way: change the spec, and give it another `name` or queue it with --fresh",
    ExitCode.MEMORY: "",
}


def _smaller(work: QueuedRun) -> int | None:
    """How many parts to cut a micro-batch into: two, or single pictures where it is odd; None where it is one picture."""
    batch = work.job.spec.train.batch_size
    return None if batch == 1 else 2 if batch % 2 == 0 else batch


def _crashed(queue: Queue, work: QueuedRun, code: int) -> None:
    """Killed, or failed in a way nobody foresaw: tried again while that helps."""
    if work.hung:
        work.reason = "no sign of life from the trainer, which was killed"
    elif code < 0:
        work.reason = f"the trainer was killed by {signal.Signals(-code).name}"
    elif not work.reason:
        work.reason = f"the trainer ended with code {code}; {work.job.run.log_file} may say why"
    saved = _newest(work)
    work.idle = 0 if saved > work.saved else work.idle + 1
    if queue.halted or work.retries >= queue.retries or work.idle >= IDLE_ATTEMPTS:
        work.reason += f" (attempt {work.retries + 1} of this queue; last checkpoint at step {saved})"
        _end(queue, work, code)
    else:
        work.retries += 1
        away = code == ExitCode.UNREACHABLE  # the hub may answer when the others have had their turn
        when = "after the runs that wait" if away and queue.waiting else f"from step {saved}"
        _again(queue, work, f"{work.reason}; trying again {when} (retry {work.retries} of {queue.retries})", last=away)


def _again(queue: Queue, work: QueuedRun, why: str, *, last: bool = False) -> None:
    queue.screen.line(why, work.name)
    work.attempt = work.job.run.next_attempt()
    _write_down(queue, work, "waiting", why)
    queue.waiting.insert(len(queue.waiting) if last else 0, work)


def _end(queue: Queue, work: QueuedRun, code: int) -> None:
    """For good, as far as this queue goes."""
    paused = code in (ExitCode.DISK, ExitCode.STOPPED, ExitCode.HELD)
    queue.left |= paused
    _tell(queue, work, "done" if code == ExitCode.DONE else "stopped" if paused else "failed")
    if code == ExitCode.DONE:
        queue.alike.clear()
    elif code == ExitCode.HELD:
        queue.screen.line(f"not run: {work.reason}", work.name)
    elif paused and not _is_gone(queue):  # else it is said once, of the whole folder
        queue.screen.line(work.reason if code == ExitCode.STOPPED else f"paused: {work.reason}", work.name)
        _write_down(queue, work, "stopped", work.reason)
    elif not paused:
        if code == ExitCode.MEMORY:
            work.reason += f"; {less_memory(work.job.spec, on_gpu=work.on_gpu)}"
        queue.screen.line(f"failed: {work.reason}{NEXT.get(code, NEXT_TRY)}", work.name)
        _write_down(queue, work, "failed", work.reason)
        queue.failed = True
        _circuit_breaker(queue, work, code)
    with _as_the_disk_allows(queue, work):
        work.job.run.release()
        _write_index(queue)


def _tell(queue: Queue, work: QueuedRun, how: str) -> None:
    target = Target(**work.job.spec.notify.model_dump())
    queue.targets[target] = None
    text = f"{work.name}: {how}" + (f" ({work.reason})" if work.reason else "")
    queue.teller.submit(send, target, f"run {how}", work.name, text, queue.screen.line)


def _tell_the_end(queue: Queue) -> None:
    """Once to everybody who was told of a run."""
    how = "with failures" if queue.failed else "with work left" if queue.left else "all done"
    for target in queue.targets:
        queue.teller.submit(send, target, "queue done", "", f"queue: {how}", queue.screen.line)
    queue.teller.shutdown()


def _write_down(queue: Queue, work: QueuedRun, state: str, reason: str) -> None:
    if work.job.run.lost_lease():
        return
    with _as_the_disk_allows(queue, work):
        work.job.run.mark_ended(state, reason, split=work.split if work.split > 1 else None)
        _write_index(queue)


@contextmanager
def _as_the_disk_allows(queue: Queue, work: QueuedRun) -> Iterator[None]:
    """A full disk must not end the queue, which says on the screen what there is to say; nor must a folder that is gone,
    which is said elsewhere."""
    try:
        yield
    except OSError as error:
        if work.job.run.missing_message() or _is_gone(queue):
            return
        if not is_disk_error(error):
            raise
        queue.screen.line(f"the state could not be written: {error}", work.name)


def _circuit_breaker(queue: Queue, work: QueuedRun, code: int) -> None:
    named = rf"(?<!\w){re.escape(work.name)}(?!\w)"  # as a word: a run may be called "a"
    alike = re.sub(rf"{re.escape(str(work.job.run.folder))}|{named}|\d+", "#", work.reason)
    queue.alike = [*(queue.alike if queue.alike[-1:] == [alike] else []), alike]
    if queue.fail_fast:
        queue.halted = "not begun: --fail-fast"
    elif code == ExitCode.UNREACHABLE:
        queue.alike.clear()  # it says nothing of runs whose base and pictures are here
    elif len(queue.alike) == SAME_FAILURES and queue.waiting:
        queue.halted = f"not begun: {SAME_FAILURES} runs in a row failed alike ({work.reason})"
        queue.screen.line(f"stopped: {SAME_FAILURES} runs in a row failed alike; the last: {work.reason}")


def _dismiss(place: SlotState) -> None:
    trainer, place.trainer = place.trainer, None
    if trainer is not None:
        trainer.dismiss()


def _clear(place: SlotState) -> None:
    """For other queues, too."""
    _dismiss(place)
    place.slot.release()


def _leave(queue: Queue) -> None:
    """Let go of what was not begun, or not begun again."""
    for work in queue.waiting:
        queue.left = True
        _write_down(queue, work, "stopped", queue.halted or "not begun")
        with _as_the_disk_allows(queue, work):
            work.job.run.release()
            _write_index(queue)


def _newest(work: QueuedRun) -> int:
    return max((step for step, _ in work.job.run.checkpoint_files()), default=0)


def _make_sure_of_room(job: Job) -> None:
    """Raises DiskError where the disk cannot take what the plan says the run will write, or the run's folder is gone."""
    if gone := job.run.missing_message():
        raise DiskError(gone)
    free, folder = files.DISK.free(job.run.folder), job.run.folder
    wanted = left_to_write(folder, job.plan.disk_bytes) + SPARE
    if free < wanted:
        raise DiskError(
            f"the run wants about {format_bytes(wanted)}, {format_bytes(SPARE)} of them to spare, and {folder} has room for {format_bytes(free)}; "
            "free some space, then the same command goes on"
        )
