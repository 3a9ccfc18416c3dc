"""The queue's notifications: one when a run ends, and one when the queue ends."""

from __future__ import annotations

from runner.core.notify import Target, send
from runner.engine.queue_state import Queue, QueuedRun


def notify_run_end(queue: Queue, run: QueuedRun, outcome: str) -> None:
    """outcome: done, stopped or failed."""
    target = Target(**run.job.spec.notify.model_dump())
    queue.notify_targets[target] = None
    text = f"{run.name}: {outcome}" + (f" ({run.reason})" if run.reason else "")
    queue.notifier.submit(send, target, f"run {outcome}", run.name, text, queue.screen.message)


def notify_queue_end(queue: Queue) -> None:
    """Notify every target that heard of a run once, and wait until all notifications are sent."""
    outcome = "with failures" if queue.failed else "with work left" if queue.unfinished else "all done"
    for target in queue.notify_targets:
        queue.notifier.submit(send, target, "queue done", "", f"queue: {outcome}", queue.screen.message)
    queue.notifier.shutdown()
