"""The worker process: it trains one run after another on one device, each named by its folder on stdin.

Its exit code says how the last run ended (`runner.core.errors.ExitCode`). Events go to the queue as JSON lines on
stdout, and text into the run's log.
"""

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
from runner.model import device, libraries
from runner.model.base import Base
from runner.plan.faults import PlanError
from runner.plan.phases import Plan
from runner.runs.run import Run
from runner.runs.spec_file import read_spec
from runner.spec.schema import Spec
from runner.training.context import RunContext, open_base, open_cache
from runner.training.distributed import Ranks
from runner.training.model_pool import ModelPool
from runner.training.run import execute_run

LEAK = 256 << 20  # bytes that may stay in use between runs before the process is replaced
ENCODER_KEYS = ("base", "revision", "variant", "dtype", "quantize")  # of `model`: runs that share them share encoders
MAX_TEXT = 300  # characters of a text in an event that is too long
MAX_EVENT = 4000  # bytes; a write of up to 4,096 to a pipe is all or nothing (pipe(7))


@dataclass(frozen=True)
class TrainRequest:
    """A run to train. upcoming: folders of runs that wait, whose captions may be encoded along with its own."""

    folder: Path
    attempt: int
    upcoming: tuple[Path, ...] = ()

    @classmethod
    def from_json(cls, line: str) -> TrainRequest:
        """As `runner.engine.worker` writes it."""
        fields = json.loads(line)
        return cls(Path(fields["folder"]), fields["attempt"], tuple(map(Path, fields["upcoming"])))


@dataclass
class WorkerState:
    """What the process keeps from run to run.

    first_bytes: device memory in use after the first run, without the model pool. pictures: data sets of upcoming runs,
    each read once.
    """

    model_pool: ModelPool = field(default_factory=ModelPool)
    first_bytes: int | None = None
    pictures: dict[DatasetSource, Pictures] = field(default_factory=dict)

    def has_leaked(self, gpus: str | None) -> bool:
        """Whether a run's memory was not freed, so that the next run should get a new process."""
        torch_device = device.choose_device(gpus)
        device.release(torch_device)
        in_use = device.memory_in_use(torch_device) - self.model_pool.bytes
        if self.first_bytes is None:
            self.first_bytes = in_use
        return in_use - self.first_bytes > LEAK


def main(gpus: str | None, stop: StopRequest) -> ExitCode:
    """Train the runs that stdin names, one per line, until one does not end well or memory has leaked."""
    events = os.dup(sys.stdout.fileno())
    os.set_blocking(events, False)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes into the log
    send = event_sender(events)
    libraries.preload_libraries()
    libraries.quiet()
    state, code = WorkerState(), ExitCode.DONE
    while code is ExitCode.DONE and (line := sys.stdin.readline()):
        request = TrainRequest.from_json(line)
        try:
            with (request.folder / "run.log").open("a") as log:
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(log.fileno(), stream.fileno())
            code = train_run(request, gpus, send, stop, state)
        except OSError as error:  # the folder was removed before the run began
            code, reason = classify_error(error)
            send({"kind": "run_ended", "reason": reason})
            break
        if code is ExitCode.DONE:
            leaked = state.has_leaked(gpus)
            send({"kind": "run_done", "leaked": leaked})
            if leaked:
                break
    return code


def event_sender(pipe: int) -> Callable[[Event], None]:
    """A function that writes events into a pipe, and drops them while the pipe is full: a reader that is stopped must
    not stop the training."""

    def send(event: Event) -> None:
        line = json.dumps(event)
        if len(line) > MAX_EVENT:  # JSON takes up to six bytes per character
            line = json.dumps(
                {key: value[:MAX_TEXT] if isinstance(value, str) else value for key, value in event.items()}
            )
        try:
            os.write(pipe, f"{line}\n".encode())
        except BlockingIOError:
            return

    return send


def train_run(
    request: TrainRequest, gpus: str | None, send: Callable[[Event], None], stop: StopRequest, state: WorkerState
) -> ExitCode:
    """Train a run. Its end is recorded in its log and state, sent as an event, and returned as an exit code."""
    run, attempt = Run.at(request.folder), request.attempt
    event_log = EventLog(send, run.log_file)
    try:
        _train(run, request, gpus, event_log, stop, state)
        return ExitCode.DONE
    except (Exception, KeyboardInterrupt) as error:
        # Every error ends this run alone, and is reported here.
        code, reason = (ExitCode.DISK, gone) if (gone := run.missing_message()) else classify_error(error)
        send({"kind": "run_ended", "reason": reason})
        if code is not ExitCode.LOCKED:  # else the folder is another process's to write in
            event_log.log(reason if code is ExitCode.STOPPED else f"{traceback.format_exc()}{reason}")
            _record_end(run, attempt, "stopped" if code in (ExitCode.STOPPED, ExitCode.DISK) else "failed", reason)
        return code
    finally:
        torch.cuda.empty_cache()  # does nothing without a GPU


def _train(
    run: Run, request: TrainRequest, gpus: str | None, event_log: EventLog, stop: StopRequest, state: WorkerState
) -> None:
    """Read the spec and the data, check them against the plan, open the base, and run all phases."""
    spec = read_spec(run.spec_file)
    torch_device = device.choose_device(gpus)
    device.prepare_device(torch_device, tf32=spec.model.tf32)
    libraries.quiet()
    try:
        pictures = sources.read_source(data_source(spec)).hold_out(spec.data.holdout)
    except DataError as error:
        raise FluxrunError(f"data.source: {error}") from error
    try:
        plan = plan_of(spec, pictures)
    except PlanError as error:  # the data could not be read when the queue planned the run
        raise FluxrunError(str(error)) from error
    _check_planned_key(run, plan)
    micro_batch_parts = run.micro_batch_parts(spec.train.batch_size)
    cache = open_cache(run.runs)
    base = open_base(spec, torch_device, cache)

    def upcoming() -> list[RunContext]:
        contexts = (_upcoming_context(folder, spec, base, cache, event_log, state) for folder in request.upcoming)
        return [context for context in contexts if context]

    with train_on_ranks(spec, plan.key, run.runs, torch_device, micro_batch_parts) as ranks:
        context = RunContext(
            spec, plan, pictures, base, cache, event_log, ranks, stop, micro_batch_parts, state.model_pool
        )
        execute_run(run, context, attempt=request.attempt, upcoming=upcoming)


def _upcoming_context(
    folder: Path, current: Spec, base: Base, cache: Cache, event_log: EventLog, state: WorkerState
) -> RunContext | None:
    """The context of an upcoming run, if it uses the encoders of the current one.

    What is wrong with the upcoming run is only logged here; it is reported when the run starts.
    """
    run = Run.at(folder)
    try:
        spec = read_spec(run.spec_file)
        source = data_source(spec)
        if any(getattr(spec.model, key) != getattr(current.model, key) for key in ENCODER_KEYS):
            return None
        if source not in state.pictures:
            state.pictures[source] = sources.read_source(source)
        pictures = state.pictures[source].hold_out(spec.data.holdout)
        plan = plan_of(spec, pictures)
    except (DataError, FluxrunError, PlanError, OSError) as error:
        event_log.log(f"the captions of {run.name} are not encoded ahead: {error}")
        return None
    return RunContext(spec, plan, pictures, base, cache, event_log, Ranks(), lambda: False)


def _check_planned_key(run: Run, plan: Plan) -> None:
    """Raises RunMismatchError where the run is not as the queue planned it."""
    if run.planned_key() != plan.key:
        raise RunMismatchError(
            f"the data, the base or the spec.toml of {run.folder} is not as it was when the queue planned it; "
            "the same command plans again"
        )


def classify_error(error: BaseException) -> tuple[ExitCode, str]:
    """The exit code for an error that ended a run, and the reason to report."""
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


def _record_end(run: Run, attempt: int, state: str, reason: str) -> None:
    """Write the end into the state, if the run still is this attempt's. A disk error is only printed: the end was
    sent."""
    try:
        with run.locked():
            if run.lease().attempt == attempt:
                run.write_outcome(state, reason)
    except (FluxrunError, OSError) as error:
        print(f"the state could not be written: {error}", file=sys.stderr)
