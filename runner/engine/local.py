"""Runs in turn on this machine, in this process; one that fails does not stop the next."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from runner import device, flux
from runner.engine.crew import crew
from runner.errors import FluxrunError, Interrupted, Refused
from runner.execute import execute, open_cache
from runner.index import write_index
from runner.prepare import Job
from runner.say import Say
from runner.stop import StopRequest

DONE, FAILED, STOPPED = 0, 1, 3


def run_queue(
    jobs: Sequence[Job], runs: Path, gpus: str | None, say: Say, stop: StopRequest, *, fail_fast: bool
) -> int:
    """The exit code: 0 all done, 1 some failed, 3 stopped with work left."""
    where = device.choose(gpus)
    flux.quiet()
    code = DONE
    for number, job in enumerate(jobs):
        if stop():
            return STOPPED
        say.begin_run(job.plan.name, job.run.log_file, sum(later.plan.steps for later in jobs[number + 1 :]))
        try:
            _run_one(job, runs, where, say, stop)
        except Refused as error:
            say.log_file = None  # the folder is not ours to write in
            say.line(f"not run: {error}")
            code = FAILED
        except (Interrupted, KeyboardInterrupt) as error:
            note = str(error) or "stopped at once; the last checkpoint stands"
            say.line(note)
            _end(job, "stopped", note)
            return STOPPED
        except Exception as error:
            # One run's failure, whatever it is, must not stop the night; it is told here, in the state and by the code.
            say.log(traceback.format_exc())
            reason = str(error) if isinstance(error, FluxrunError) else f"{type(error).__name__}: {error}"
            say.line(f"failed: {reason}; the same command tries again from the last checkpoint")
            _end(job, "failed", reason)
            code = FAILED
            if fail_fast:
                return code
        finally:
            say.end_run()
            write_index(runs)
            device.release(where)
    return code


def _run_one(job: Job, runs: Path, where: torch.device, say: Say, stop: StopRequest) -> None:
    model = job.spec.model
    device.prepare(where, tf32=model.tf32)
    base = flux.open_base(model.base, model.revision, model.variant, where, device.resolve_dtype(model.dtype, where))
    assert job.pictures is not None  # `queue` fetches
    with crew(job, runs, where) as ranks:
        execute(job.run, job.spec, job.plan, job.pictures, base, open_cache(runs), say, stop, ranks)


def _end(job: Job, state: str, reason: str) -> None:
    """Keep what the state already says of progress; replace what it says of the present."""
    facts = {
        key: value
        for key, value in job.run.state().items()
        if key in ("phase", "step", "wall_s", "s_per_step", "peak_memory_bytes", "train_loss", "eval_loss")
    }
    if job.run.folder.is_dir():
        job.run.write_state(state, **facts, error=reason)
