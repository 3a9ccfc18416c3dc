"""Writes the checkpoints of one run, behind the training's back: training waits only for the copy out of the device."""

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
    """One save at a time, in order. `log` hears of a step only once it is on the disk and was read back; what went
    wrong is raised by the next call. `check_lease` raises where this process may no longer write."""

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
        self.pool.submit(int)  # starts the thread now: a signal while it starts would leave it to itself
        self.pending: Future[None] | None = None

    def save(self, made: Checkpoint) -> None:
        """Begin to write `made`, whose tensors nobody else changes, once the save before it is done."""
        self.wait()
        self.pending = self.pool.submit(self.write, made)

    def look(self) -> None:
        """Raise what a save has failed of, without waiting for it."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish what is being written; its failure has been raised, or something worse is on its way."""
        self.pool.shutdown()

    def write(self, made: Checkpoint) -> None:
        """Write, read back, then prune: never an instant without a verified checkpoint."""
        path = self.folder / checkpoint_name(made.step)
        self._make_sure_of_room(made)
        self.check_lease()
        storage.write(path, made, disk=self.disk)
        try:
            storage.read(path)
        except BadFileError as error:
            raise DiskError(
                f"{error}; so it was read back right after it was written: the disk is failing, or the memory. The "
                "checkpoint before it stands; the same command goes on from there"
            ) from error
        self.check_lease()
        self.best = made.scalars.get("meters", {}).get("best_step")
        self._prune(made.step)
        self.log(f"checkpoint at step {made.step}")

    def _make_sure_of_room(self, made: Checkpoint) -> None:
        size = sum(tensor.nbytes for tensor in storage.named(made).values())
        free = self.disk.free(self.folder)
        if free < size + SPARE:
            raise DiskError(
                f"no room for the checkpoint of step {made.step} in {self.folder}: {free >> 20} MiB free, it needs "
                f"{(size + SPARE) >> 20}; the checkpoint before it stands. Free some space, then the same command goes on"
            )

    def _prune(self, step: int) -> None:
        """Those of later steps are another plan's, and left alone; the best step's is kept for the export."""
        spared = {*self.kept_always, self.best}
        there = [(number, path) for number, path in checkpoint_steps(self.folder) if number <= step]
        for number, path in [one for one in there if one[0] not in spared][self.keep :]:
            assert number < step
            try:
                self.disk.unlink(path)
            except OSError as error:  # one file too many harms nothing
                self.log(f"{path.name}: an old checkpoint, cannot be removed ({error})")
