"""The negative controls: writers and a loader that do what must not be done, each in one respect. A method that does
not catch them proves nothing of the real ones. Disks go around another one (which logs, fails or dies); writers prune
or speak at the wrong time."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint
from runner.checkpoint.writer import Writer
from runner.core import files, safetensors
from runner.runs.checkpoint_files import checkpoint_name, checkpoint_steps
from runner.runs.run import Run


class Around(files.Disk):
    """Another disk, unchanged."""

    def __init__(self, inner: files.Disk) -> None:
        self.inner = inner
        for name in ("create", "write", "close", "free", "rename", "unlink"):
            setattr(self, name, getattr(inner, name))
        for name in ("sync", "sync_folder"):
            if name not in type(self).__dict__:
                setattr(self, name, getattr(inner, name))


class NoFileSync(Around):
    """Renames what is not on the disk yet."""

    def sync(self, handle: int) -> None:
        pass


class NoFolderSync(Around):
    """Believes that a rename lasts."""

    def sync_folder(self, folder: Path) -> None:
        pass


class NoSync(Around):
    """Neither of the two, as most trainers save."""

    def sync(self, handle: int) -> None:
        pass

    def sync_folder(self, folder: Path) -> None:
        pass


class SwallowsSyncErrors(Around):
    """Tries again after a failed fsync, which then succeeds, since the pages are marked clean: they are lost."""

    def sync(self, handle: int) -> None:
        with suppress(OSError):
            self.inner.sync(handle)

    def sync_folder(self, folder: Path) -> None:
        with suppress(OSError):
            self.inner.sync_folder(folder)


class InPlace(files.Disk):
    """No file aside: writes under the final name. Syncs as it should."""

    def __init__(self, inner: files.Disk) -> None:
        self.inner = inner
        for name in ("write", "sync", "close", "free", "sync_folder"):
            setattr(self, name, getattr(inner, name))

    def create(self, path: Path) -> int:
        return self.inner.create(final(path))

    def rename(self, old: Path, new: Path) -> None:
        pass

    def unlink(self, path: Path) -> None:
        self.inner.unlink(final(path))


def final(path: Path) -> Path:
    """.NAME.PID.partial -> NAME"""
    return path.with_name(path.name[1:].rsplit(".", 2)[0]) if path.name.endswith(files.PARTIAL_SUFFIX) else path


class PrunesFirst(Writer):
    """Makes room for the new checkpoint before there is one (as accelerate does)."""

    def write(self, made: Checkpoint) -> None:
        for _, path in checkpoint_steps(self.folder)[max(0, self.keep - 1) :]:
            self.disk.unlink(path)
        storage.write(self.folder / checkpoint_name(made.step), made, disk=self.disk)
        self.log(f"checkpoint at step {made.step}")


class SpeaksFirst(Writer):
    """Says that a step is saved when it has only begun to save it."""

    def write(self, made: Checkpoint) -> None:
        self.log(f"checkpoint at step {made.step}")
        storage.write(self.folder / checkpoint_name(made.step), made, disk=self.disk)
        self._prune(made.step)


class PrunesTooEarly(Writer):
    """Removes the old one when the new one has its name, but not yet durably; then syncs the folder, and only then says
    so: what it says holds, but what it said before is broken meanwhile."""

    def write(self, made: Checkpoint) -> None:
        storage.write(self.folder / checkpoint_name(made.step), made, disk=NoFolderSync(self.disk))
        self._prune(made.step)
        self.disk.sync_folder(self.folder)
        self.log(f"checkpoint at step {made.step}")


def highest(run: Run) -> Checkpoint | None:
    """A loader that takes the highest number and believes it: shape and header are right, or it fails."""
    from safetensors.torch import load_file

    there = checkpoint_steps(run.checkpoints)
    if not there:
        return None
    step, path = there[0]
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    header = safetensors.read_metadata(path)
    return storage._from_tensors("joint", "key", step, found, {"d": float(header["scalars"].strip("}").split(":")[1])})
