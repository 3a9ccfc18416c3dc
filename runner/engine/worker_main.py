"""The trainer process: one run after another on one device, each told by its folder; its exit code says how the last one
ended (`runner.core.errors.ExitCode`). What it has to tell goes to the queue as JSON lines on stdout, and into the run's log."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runner.cache.store import Cache
from runner.core.errors import ExitCode, FluxrunError, RunMismatchError, is_disk_error
from runner.core.events import Event, EventLog
from runner.core.signals import StopRequest
from runner.data import sources
from runner.data.images import DataError, Pictures
from runner.data.sources import DatasetSource
from runner.engine.multi_gpu import train_on_ranks
from runner.jobs.data_sets import data_source
from runner.jobs.prepare import plan_of
from runner.model import device
from runner.model.base import Base
from runner.model.flux1 import loading
from runner.plan.build import PlanError
from runner.plan.phases import Plan
from runner.runs.run import Run, read_spec
from runner.spec.schema import Spec
from runner.training.context import RunContext, open_cache
from runner.training.distributed import Ranks
from runner.training.model_pool import ModelPool
from runner.training.run import execute_run

LEAK = 256 << 20  # bytes that may stay behind between runs
SAME_ENCODERS = ("base", "revision", "variant", "dtype", "quantize")
SHORT = 300
LONGEST = 4000  # bytes of an event; a write of up to 4,096 to a pipe is all or nothing (pipe(7))


@dataclass(frozen=True)
class TrainRequest:
    """A run to train; `later`: folders of runs that wait for their turn, whose captions may be encoded with its own."""

    folder: Path
    attempt: int
    later: tuple[Path, ...] = ()

    @classmethod
    def read(cls, line: str) -> TrainRequest:
        """As `runner.engine.worker` writes it."""
        facts = json.loads(line)
        return cls(Path(facts["folder"]), facts["attempt"], tuple(map(Path, facts["later"])))


def main(gpus: str | None, stop: StopRequest) -> ExitCode:
    """The runs that stdin names, a line each, for as long as all is well."""
    events = os.dup(sys.stdout.fileno())
    os.set_blocking(events, False)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is for the log
    device.preload_libraries()
    loading.quiet()
    warm, code = WorkerState(), ExitCode.DONE
    while code is ExitCode.DONE and (line := sys.stdin.readline()):
        told = TrainRequest.read(line)
        try:
            with (told.folder / "run.log").open("a") as log:
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(log.fileno(), stream.fileno())
            code = train_run(told, gpus, sender(events), stop, warm)
        except OSError as error:  # the folder went before the run began
            code, reason = classify_error(error)
            sender(events)({"say": "ended", "reason": reason})
            break
        if code is ExitCode.DONE:
            worn = warm.worn(gpus)
            sender(events)({"say": "done", "worn": worn})
            if worn:
                break
    return code


@dataclass
class WorkerState:
    """What a trainer process keeps from run to run. `first`: bytes in use after its first run, less what is kept on
    purpose; `data`: data sets of runs that come later, read once."""

    model_pool: ModelPool = field(default_factory=ModelPool)
    first: int | None = None
    data: dict[DatasetSource, Pictures] = field(default_factory=dict)

    def worn(self, gpus: str | None) -> bool:
        """Whether memory did not come back, so that the next run had better have a process of its own."""
        where = device.choose_device(gpus)
        device.release(where)
        left = device.memory_in_use(where) - self.model_pool.bytes
        if self.first is None:
            self.first = left
        return left - self.first > LEAK


def sender(pipe: int) -> Callable[[Event], None]:
    """Events into a pipe. A reader that is stopped must not stop the training: what does not fit is dropped."""

    def send(event: Event) -> None:
        line = json.dumps(event)
        if len(line) > LONGEST:  # of which JSON makes up to six bytes a character
            line = json.dumps({key: value[:SHORT] if isinstance(value, str) else value for key, value in event.items()})
        try:
            os.write(pipe, f"{line}\n".encode())
        except BlockingIOError:
            return

    return send


def train_run(
    told: TrainRequest, gpus: str | None, send: Callable[[Event], None], stop: StopRequest, warm: WorkerState
) -> ExitCode:
    """Train a run and write down how it ended: in its log and state, by an event and by the code."""
    run, attempt = Run.at(told.folder), told.attempt
    event_log = EventLog(send, run.log_file)
    try:
        _train(run, told, gpus, event_log, stop, warm)
        return ExitCode.DONE
    except (Exception, KeyboardInterrupt) as error:
        # Whatever it is, it is this run's alone, and told here.
        code, reason = (ExitCode.DISK, gone) if (gone := run.missing_message()) else classify_error(error)
        send({"say": "ended", "reason": reason})
        if code is not ExitCode.HELD:  # the folder is not ours to write in
            event_log.log(reason if code is ExitCode.STOPPED else f"{traceback.format_exc()}{reason}")
            _write_down(run, attempt, "stopped" if code in (ExitCode.STOPPED, ExitCode.DISK) else "failed", reason)
        return code
    finally:
        torch.cuda.empty_cache()  # does nothing without a GPU


def _train(
    run: Run, told: TrainRequest, gpus: str | None, event_log: EventLog, stop: StopRequest, warm: WorkerState
) -> None:
    spec = read_spec(run.spec_file)
    where = device.choose_device(gpus)
    device.prepare_device(where, tf32=spec.model.tf32)
    loading.quiet()
    try:
        pictures = sources.read_source(data_source(spec)).hold_out(spec.data.holdout)
    except DataError as error:
        raise FluxrunError(f"data.source: {error}") from error
    try:
        plan = plan_of(spec, pictures)
    except PlanError as error:  # of a data set that could not be read when the queue planned the run
        raise FluxrunError(str(error)) from error
    _same_as_planned(run, plan)
    model, split = spec.model, run.micro_batch_parts(spec.train.batch_size)
    cache, dtype = open_cache(run.runs), device.resolve_dtype(model.dtype, where)
    base = loading.open_base(
        model.base, model.revision, model.variant, where, dtype, model.quantize, cache.folder, model.offload == "blocks"
    )

    def beside() -> list[RunContext]:
        return [context for folder in told.later if (context := _later(folder, spec, base, cache, event_log, warm))]

    with train_on_ranks(spec, plan.key, run.runs, where, split) as ranks:
        execute_run(
            run, spec, plan, pictures, base, cache, event_log, stop, ranks, attempt=told.attempt, split=split, model_pool=warm.model_pool,
            beside=beside,
        )  # fmt: skip


def _later(
    folder: Path, now: Spec, base: Base, cache: Cache, event_log: EventLog, warm: WorkerState
) -> RunContext | None:
    """A run that comes later, if it reads its captions with the encoders of this one. What is wrong with it is its own
    affair, and will be told when its turn has come."""
    run = Run.at(folder)
    try:
        spec = read_spec(run.spec_file)
        asked = data_source(spec)
        if any(getattr(spec.model, name) != getattr(now.model, name) for name in SAME_ENCODERS):
            return None
        if asked not in warm.data:
            warm.data[asked] = sources.read_source(asked)
        pictures = warm.data[asked].hold_out(spec.data.holdout)
        plan = plan_of(spec, pictures)
    except (DataError, FluxrunError, PlanError, OSError) as error:
        event_log.log(f"the captions of {run.name} are not encoded ahead: {error}")
        return None
    return RunContext(spec, plan, pictures, base, cache, event_log, Ranks(), lambda: False)


def _same_as_planned(run: Run, plan: Plan) -> None:
    if run.planned_key() != plan.key:
        raise RunMismatchError(
            f"the data, the base or the spec.toml of {run.folder} is not as it was when the queue planned it; "
            "the same command plans again"
        )


def classify_error(error: BaseException) -> tuple[ExitCode, str]:
    """What kind of end it is, and how to say it."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.STOPPED, "stopped at once; the last checkpoint stands"
    if isinstance(error, FluxrunError):
        return error.code, str(error)
    if isinstance(error, OSError) and is_disk_error(error):
        where = f" ({error.filename})" if error.filename else ""
        return ExitCode.DISK, f"{os.strerror(error.errno or errno.EIO)}{where}; the checkpoint before it stands"
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return ExitCode.MEMORY, f"out of memory ({text.splitlines()[0] if text else type(error).__name__})"
    return ExitCode.CRASHED, f"{type(error).__name__}: {text}"


def _write_down(run: Run, attempt: int, state: str, reason: str) -> None:
    """Into the state, if the run still is this attempt's and the disk can hold it; it has been said in any case."""
    try:
        with run.locked():
            if run.lease().attempt == attempt:
                run.mark_ended(state, reason)
    except (FluxrunError, OSError) as error:
        print(f"the state could not be written: {error}", file=sys.stderr)
