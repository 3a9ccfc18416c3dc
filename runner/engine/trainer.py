"""The trainer process: one run after another on one device, each told by its folder; its exit code says how the last one
ended (`runner.errors.Code`). What it has to tell goes to the queue as JSON lines on stdout, and into the run's log."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from runner import device, flux, sources
from runner.data import DataError
from runner.engine.crew import crew
from runner.errors import Code, FluxrunError, Refused, disk_trouble
from runner.execute import execute, open_cache
from runner.plan import Plan
from runner.prepare import data_source, plan_of
from runner.rundir import Run, read_spec
from runner.say import Event, Say
from runner.stop import StopRequest

SHORT = 300
LONGEST = 4000  # bytes of an event; a write of up to 4,096 to a pipe is all or nothing (pipe(7))


def main(folder: Path, attempt: int, gpus: str | None, stop: StopRequest) -> Code:
    """The run in `folder`, then those that stdin names, a line "ATTEMPT FOLDER" each, for as long as all is well."""
    events = os.dup(sys.stdout.fileno())
    os.set_blocking(events, False)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is for the log
    flux.quiet()
    device.settle_libraries()
    code = train_run(folder, attempt, gpus, sender(events), stop)
    while code is Code.DONE:
        sender(events)({"say": "done"})
        order = sys.stdin.readline().split(maxsplit=1)
        if not order:
            break
        folder = Path(order[1].rstrip("\n"))
        with (folder / "run.log").open("a") as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
        code = train_run(folder, int(order[0]), gpus, sender(events), stop)
    return code


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


def train_run(folder: Path, attempt: int, gpus: str | None, send: Callable[[Event], None], stop: StopRequest) -> Code:
    """Train the run in `folder` and write down how it ended: in its log and state, by an event and by the code."""
    run = Run.at(folder)
    say = Say(send, run.log_file)
    try:
        _train(run, attempt, gpus, say, stop)
        return Code.DONE
    except (Exception, KeyboardInterrupt) as error:
        # Whatever it is, it is this run's alone, and told here.
        code, reason = verdict(error)
        send({"say": "ended", "reason": reason})
        if code is not Code.HELD:  # the folder is not ours to write in
            say.log(reason if code is Code.STOPPED else f"{traceback.format_exc()}{reason}")
            _write_down(run, attempt, "stopped" if code in (Code.STOPPED, Code.DISK) else "failed", reason)
        return code
    finally:
        torch.cuda.empty_cache()  # does nothing without a GPU


def _train(run: Run, attempt: int, gpus: str | None, say: Say, stop: StopRequest) -> None:
    spec = read_spec(run.spec_file)
    where = device.choose(gpus)
    device.prepare(where, tf32=spec.model.tf32)
    flux.quiet()
    try:
        pictures = sources.read(data_source(spec)).hold_out(spec.data.holdout)
    except DataError as error:
        raise FluxrunError(f"data.source: {error}") from error
    plan = plan_of(spec, pictures)
    _same_as_planned(run, plan)
    model, split = spec.model, run.split(spec.train.batch_size)
    cache, dtype = open_cache(run.runs), device.resolve_dtype(model.dtype, where)
    base = flux.open_base(
        model.base, model.revision, model.variant, where, dtype, model.quantize, cache.folder, model.offload == "blocks"
    )
    with crew(spec, plan.key, run.runs, where, split) as ranks:
        execute(run, spec, plan, pictures, base, cache, say, stop, ranks, attempt=attempt, split=split)


def _same_as_planned(run: Run, plan: Plan) -> None:
    if run.planned_key() != plan.key:
        raise Refused(
            f"the data, the base or the spec.toml of {run.folder} is not as it was when the queue planned it; "
            "the same command plans again"
        )


def verdict(error: BaseException) -> tuple[Code, str]:
    """What kind of end it is, and how to say it."""
    if isinstance(error, KeyboardInterrupt):
        return Code.STOPPED, "stopped at once; the last checkpoint stands"
    if isinstance(error, FluxrunError):
        return error.code, str(error)
    if isinstance(error, OSError) and disk_trouble(error):
        where = f" ({error.filename})" if error.filename else ""
        return Code.DISK, f"{os.strerror(error.errno or errno.EIO)}{where}; the checkpoint before it stands"
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return Code.MEMORY, f"out of memory ({text.splitlines()[0] if text else type(error).__name__})"
    return Code.CRASHED, f"{type(error).__name__}: {text}"


def _write_down(run: Run, attempt: int, state: str, reason: str) -> None:
    """Into the state, if the run still is this attempt's and the disk can hold it; it has been said in any case."""
    try:
        with run.locked():
            if run.lease().attempt == attempt:
                run.end(state, reason)
    except (FluxrunError, OSError) as error:
        print(f"the state could not be written: {error}", file=sys.stderr)
