"""Files that are either whole or not there: write aside, fsync, rename; safetensors bytes; locks.

No torch here: tensors come in as (dtype name, shape, bytes). Every operation of a durable write goes through a `Disk`,
so that a test can log them, let one fail, or die between two.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.core.errors import FluxrunError, is_disk_error

PARTIAL_SUFFIX = ".partial"  # a stale side file is overwritten or swept, never trusted


class Disk:
    """The operations that a durable write is made of, on the real disk."""

    def create(self, path: Path) -> int:
        """A handle on a new, empty file. A symbolic link in its place is not followed."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def write(self, handle: int, data: bytes | memoryview) -> None:
        left = memoryview(data).cast("B")
        while left.nbytes:
            left = left[os.write(handle, left) :]

    def sync(self, handle: int) -> None:
        """Some disks tell that they are full only here."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """A rename survives a power cut only once its folder is synced."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def free(self, folder: Path) -> int:
        """Bytes that this user may still write there."""
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize


DISK = Disk()


def partial_path(path: Path) -> Path:
    """Where a file is written before it gets its name: of this process, since two may fill one cache entry."""
    return path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")


def write_bytes(path: Path, chunks: Iterable[bytes | memoryview], *, durable: bool = True, disk: Disk = DISK) -> None:
    """Write `path` so that a reader sees the old content or the new, never a part.

    durable=False leaves out both fsyncs: for files like the heartbeat, that are worthless after a power cut. What
    cannot be written whole leaves nothing: after a failed fsync the pages may be lost, so the attempt is discarded.
    """
    aside = partial_path(path)
    handle = disk.create(aside)
    try:
        try:
            for chunk in chunks:
                disk.write(handle, chunk)
            if durable:
                disk.sync(handle)
        finally:
            disk.close(handle)
        disk.rename(aside, path)
    except BaseException:
        disk.unlink(aside)
        raise
    if durable:
        disk.sync_folder(path.parent)


@contextmanager
def ignore_disk_errors() -> Iterator[None]:
    """For what is only told: a full or failing disk, or a folder that is gone, stops a run where it would lose something,
    not at a message."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if not is_disk_error(error):
            raise


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    write_bytes(path, [text.encode()], durable=durable)


def write_json(path: Path, value: object, *, durable: bool = True) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", durable=durable)


def write_png(path: Path, image: Any) -> None:
    """`image`: a PIL picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, [buffer.getvalue()])


def make_folder(path: Path, within: Path | None = None) -> Path:
    """Create `path` and its parents, durably. `within`: one that must be there: where a disk was taken away, nothing shall
    be written below the place where it was."""
    if within is not None and not within.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(within))
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        DISK.sync_folder(folder.parent)
    return path


def output_folder(path: Path) -> Path:
    """The folder of an output that a user named, made where it is not there. Raises FluxrunError where the folder cannot be
    made, no file can be created in it (which root is told only by trying), or `path` is a device or the like."""
    if path.exists() and not path.is_file():
        raise FluxrunError(f"{path}: cannot be written (it exists and is no regular file); name another")
    try:
        folder = make_folder(path.parent)
    except OSError as error:
        raise FluxrunError(f"{path}: cannot be written ({error.filename}: {error.strerror}); name another") from error
    aside = partial_path(path)
    try:
        DISK.close(DISK.create(aside))
        DISK.unlink(aside)
    except OSError as error:
        raise FluxrunError(f"{path}: cannot be written ({folder}: {error.strerror}); name another") from error
    return folder


def remove_partial_files(folder: Path) -> None:
    """Remove what an interrupted write left."""
    for stale in folder.glob(f".*{PARTIAL_SUFFIX}"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def replace_folder(aside: Path, path: Path) -> None:
    """Put the finished folder `aside` in the place of `path`."""
    old = path.with_name(f".{path.name}.old{PARTIAL_SUFFIX}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(aside, path)
    DISK.sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file, or no JSON object in it: a heartbeat is not synced, so a power cut may leave it
    empty; and a run folder may come from anywhere."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
