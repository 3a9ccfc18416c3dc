"""Asynchronous checkpoint writer: training blocks only while the tensors are copied out of the device."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint
from runner.core import files
from runner.core.errors import BadFileError, DiskError
from runner.plan.disk import SPARE
from runner.runs.checkpoint_files import checkpoint_name, checkpoint_steps


class Writer:
    """Writes checkpoints in a thread, one at a time and in order, and removes old ones.

    keep: how many checkpoints to keep, besides those of the steps in `kept_always` and of the best step. check_lease:
    raises LockHeldError when another attempt owns the run. log: told of each step once its checkpoint was read back
    from the disk. A failed write is raised by the next `save`, `wait` or `raise_if_failed`.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        kept_always: Collection[int],
        check_lease: Callable[[], None],
        log: Callable[[str], None],
        disk: files.Disk = files.DISK,
    ) -> None:
        self.folder, self.keep, self.kept_always = folder, keep, kept_always
        self.check_lease, self.log, self.disk = check_lease, log, disk
        self.best: int | None = None
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pool.submit(int)  # start the thread now: a signal during its start would leave it without an owner
        self.pending: Future[None] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Wait for the previous write, then begin to write this one. Its tensors must not change any more."""
        self.wait()
        self.pending = self.pool.submit(self.write, checkpoint)

    def raise_if_failed(self) -> None:
        """Raise what the pending write failed with, without waiting for it."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the pending write, and raise what it failed with."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish the pending write without raising: by now its failure was raised, or the run ends for another
        reason."""
        self.pool.shutdown()

    def write(self, checkpoint: Checkpoint) -> None:
        """Write, read back, then remove old checkpoints, so that a verified one exists at every moment.

        Raises DiskError for a full or failing disk."""
        path = self.folder / checkpoint_name(checkpoint.step)
        self._require_space(checkpoint)
        self.check_lease()
        storage.write(path, checkpoint, disk=self.disk)
        try:
            storage.read(path)
        except BadFileError as error:
            raise DiskError(
                f"{error}; that is what came back right after writing, so the disk or the memory is failing. The "
                "checkpoint before it stands; the same command goes on from there"
            ) from error
        self.check_lease()
        self.best = checkpoint.scalars.get("meters", {}).get("best_step")
        self._prune(checkpoint.step)
        self.log(f"checkpoint at step {checkpoint.step}")

    def _require_space(self, checkpoint: Checkpoint) -> None:
        size = sum(tensor.nbytes for tensor in storage.named_tensors(checkpoint).values())
        free = self.disk.free(self.folder)
        if free < size + SPARE:
            raise DiskError(
                f"no room for the checkpoint of step {checkpoint.step} in {self.folder}: {free >> 20} MiB free, it needs "
                f"{(size + SPARE) >> 20}; the checkpoint before it stands. Free some space, then the same command goes on"
            )

    def _prune(self, step: int) -> None:
        """Remove all but the newest `keep` checkpoints. Those of later steps belong to another plan and stay; the best
        step's stays for the export."""
        kept = {*self.kept_always, self.best}
        existing = [(number, path) for number, path in checkpoint_steps(self.folder) if number <= step]
        for number, path in [(number, path) for number, path in existing if number not in kept][self.keep :]:
            assert number < step
            try:
                self.disk.unlink(path)
            except OSError as error:  # a file too many does no harm
                self.log(f"{path.name}: this old checkpoint cannot be removed ({error})")
