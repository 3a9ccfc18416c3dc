"""What happens to a run when its worker has ended: it is done, retried, paused or failed; and when the queue halts for
it.

The worker's exit code (`runner.core.errors.ExitCode`) decides:

- DONE, LOCKED, DISK, STOPPED, FAILED, NOT_FINITE, BAD_SPEC end the run, as far as this queue goes.
- MEMORY is retried once, with the micro-batch cut into parts; then it ends the run.
- Everything else (a signal, CRASHED, UNREACHABLE, an unknown code) is retried, up to `--retries` times, and only as long as
  attempts save new steps.
"""

from __future__ import annotations

import re
import signal

from runner.core.errors import ExitCode
from runner.engine.notifications import notify_run_end
from runner.engine.queue_state import Queue, QueuedRun
from runner.engine.run_records import record_state, release_run
from runner.jobs.card_fit import less_memory

MAX_IDLE_ATTEMPTS = 3  # crashed attempts in a row without a new checkpoint before a run is given up
# Failures of the same kind in a row that halt the queue: the machine is likely broken, and the other runs would fail
# too.
MAX_SIMILAR_FAILURES = 3

RETRIED = {ExitCode.CRASHED, ExitCode.UNREACHABLE}
PAUSED = {ExitCode.DISK, ExitCode.STOPPED, ExitCode.LOCKED}

# Ends the message of a failed run: what the same command would do.
ADVICE: dict[int, str] = {
    ExitCode.FAILED: "; once that is put right, the same command goes on from the last checkpoint",
    ExitCode.NOT_FINITE: "; the same command would end the same way: change the spec, and give it another `name` or queue it with --fresh",
    ExitCode.MEMORY: "",  # `less_memory` has said it
}
DEFAULT_ADVICE = "; the same command tries again from the last checkpoint"


def handle_worker_exit(queue: Queue, run: QueuedRun, exit_code: int) -> None:
    """Retry a run whose worker ended with `exit_code`, or finish it."""
    code = _find_cause(run, exit_code)
    if code == ExitCode.MEMORY and run.micro_batch_parts == 1 and (parts := _micro_batch_parts(run)):
        run.micro_batch_parts = parts
        train = run.job.spec.train
        size, count = train.batch_size // parts, train.accumulate * parts
        _retry(queue, run, f"{run.reason}; trying again with micro-batches of {size}, {count} to a step")
    elif code in set(ExitCode) - RETRIED:
        finish_run(queue, run, code)
    else:
        _retry_crash(queue, run, code)


def _find_cause(run: QueuedRun, code: int) -> int:
    """The exit code for what really happened, with the run's reason set to match.

    A folder that is gone, or a run that another process took over, makes workers fail in many ways. A worker that gets
    a signal before it handles signals dies of it.
    """
    if code != ExitCode.DONE and (gone := run.job.run.missing_message()):
        code, run.reason = ExitCode.DISK, gone
    elif code not in (ExitCode.DONE, ExitCode.LOCKED) and (lost_lease := run.job.run.lost_lease()):
        code, run.reason = ExitCode.LOCKED, str(lost_lease)
    if code in (-signal.SIGTERM, -signal.SIGINT):
        code, run.reason = ExitCode.STOPPED, run.reason or "stopped before it began"
    return code


def _micro_batch_parts(run: QueuedRun) -> int | None:
    """How many parts to cut a micro-batch into: 2, or single images where it is odd; None where it is one image."""
    batch = run.job.spec.train.batch_size
    return None if batch == 1 else 2 if batch % 2 == 0 else batch


def _retry_crash(queue: Queue, run: QueuedRun, code: int) -> None:
    """Retry after a crash, or fail the run where retries are used up or do not help."""
    if run.hung:
        run.reason = "the training process hung and was killed"
    elif code < 0:
        run.reason = f"the training process was killed by {signal.Signals(-code).name}"
    elif not run.reason:
        run.reason = f"the training process ended with code {code}; {run.job.run.log_file} may say why"
    step = run.newest_checkpoint()
    run.idle_attempts = 0 if step > run.first_step else run.idle_attempts + 1
    if queue.halt_reason or run.retries >= queue.max_retries or run.idle_attempts >= MAX_IDLE_ATTEMPTS:
        run.reason += f" (attempt {run.retries + 1} of this queue; last checkpoint at step {step})"
        finish_run(queue, run, code)
        return
    run.retries += 1
    unreachable = code == ExitCode.UNREACHABLE  # the hub may be back once the waiting runs have had their turn
    when = "after the runs that wait" if unreachable and queue.waiting else f"from step {step}"
    why = f"{run.reason}; trying again {when} (retry {run.retries} of {queue.max_retries})"
    _retry(queue, run, why, last=unreachable)


def _retry(queue: Queue, run: QueuedRun, why: str, *, last: bool = False) -> None:
    """Let the run wait for its next attempt: before the other runs, or `last`."""
    queue.screen.message(why, run.name)
    run.attempt = run.job.run.next_attempt()
    record_state(queue, run, "waiting", why)
    queue.waiting.insert(len(queue.waiting) if last else 0, run)


def finish_run(queue: Queue, run: QueuedRun, code: int) -> None:
    """Report and record how the run ended, as far as this queue goes, and release it."""
    paused = code in PAUSED
    queue.unfinished |= paused
    notify_run_end(queue, run, "done" if code == ExitCode.DONE else "stopped" if paused else "failed")
    if code == ExitCode.DONE:
        queue.similar_failures.clear()
    elif code == ExitCode.LOCKED:
        queue.screen.message(f"not run: {run.reason}", run.name)
    elif paused:
        _pause(queue, run, code)
    else:
        _fail(queue, run, code)
    release_run(queue, run)


def _pause(queue: Queue, run: QueuedRun, code: int) -> None:
    if queue.is_runs_folder_gone():  # reported once, at the end of the queue
        return
    queue.screen.message(run.reason if code == ExitCode.STOPPED else f"paused: {run.reason}", run.name)
    record_state(queue, run, "stopped", run.reason)


def _fail(queue: Queue, run: QueuedRun, code: int) -> None:
    if code == ExitCode.MEMORY:
        run.reason += f"; {less_memory(run.job.spec, on_gpu=run.on_gpu)}"
    queue.screen.message(f"failed: {run.reason}{ADVICE.get(code, DEFAULT_ADVICE)}", run.name)
    record_state(queue, run, "failed", run.reason)
    queue.failed = True
    _check_circuit_breaker(queue, run, code)


def _check_circuit_breaker(queue: Queue, run: QueuedRun, code: int) -> None:
    """Halt the queue after a failure with --fail-fast, or after `MAX_SIMILAR_FAILURES` of one kind in a row."""
    signature = _failure_signature(run)
    if queue.similar_failures[-1:] != [signature]:
        queue.similar_failures.clear()
    queue.similar_failures.append(signature)
    if queue.fail_fast:
        queue.halt_reason = "not begun: --fail-fast"
    elif code == ExitCode.UNREACHABLE:
        queue.similar_failures.clear()  # runs whose base and images are on this machine do not need the hub
    elif len(queue.similar_failures) == MAX_SIMILAR_FAILURES and queue.waiting:
        queue.halt_reason = f"not begun: {MAX_SIMILAR_FAILURES} runs in a row failed alike ({run.reason})"
        queue.screen.message(f"stopped: {MAX_SIMILAR_FAILURES} runs in a row failed alike; the last: {run.reason}")


def _failure_signature(run: QueuedRun) -> str:
    """The reason without what differs between runs: the folder, the name (as a word, since it may be "a") and
    numbers."""
    name = rf"(?<!\w){re.escape(run.name)}(?!\w)"
    return re.sub(rf"{re.escape(str(run.job.run.folder))}|{name}|\d+", "#", run.reason)
