"""Files that are either complete or absent: written under another name, synced, renamed.

Every operation of a durable write goes through a `Disk`, so that a test can record them, let one fail, or die between
two.
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

PARTIAL_SUFFIX = ".partial"  # of unfinished files; what an interrupted write left is overwritten or removed, never read


class Disk:
    """The operations of a durable write, on the real disk."""

    def create(self, path: Path) -> int:
        """A handle on a new, empty file. Fails where `path` is a symbolic link."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def write(self, handle: int, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest.nbytes:
            rest = rest[os.write(handle, rest) :]

    def sync(self, handle: int) -> None:
        """fsync. Some disks report only here that they are full."""
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
        """Bytes that this user may still write on the folder's disk."""
        stats = os.statvfs(folder)
        return stats.f_bavail * stats.f_frsize


DISK = Disk()


def partial_path(path: Path) -> Path:
    """Where this process writes a file before renaming it. The PID keeps processes that write the same cache entry
    apart."""
    return path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")


def write_bytes(path: Path, chunks: Iterable[bytes | memoryview], *, durable: bool = True, disk: Disk = DISK) -> None:
    """Write `path` so that readers see the old content or the new, never a part.

    durable=False leaves out both fsyncs, for files that are worthless after a power cut, such as heartbeats. A write
    that fails leaves `path` as it was; after a failed fsync, pages may be lost, so the new file is discarded.
    """
    partial = partial_path(path)
    handle = disk.create(partial)
    try:
        try:
            for chunk in chunks:
                disk.write(handle, chunk)
            if durable:
                disk.sync(handle)
        finally:
            disk.close(handle)
        disk.rename(partial, path)
    except BaseException:
        disk.unlink(partial)
        raise
    if durable:
        disk.sync_folder(path.parent)


@contextmanager
def ignore_disk_errors() -> Iterator[None]:
    """Ignore disk errors while writing informational files, e.g. logs. Only failing to write data may stop a run."""
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
    """Equal values give equal bytes. Raises ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", durable=durable)


def write_png(path: Path, image: Any) -> None:
    """`image`: a PIL image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, [buffer.getvalue()])


def make_folder(path: Path, within: Path | None = None) -> Path:
    """Create `path` and its missing parents, durably.

    within: a parent that must exist already, so that nothing is written below the mount point of a disk that was
    removed. Raises FileNotFoundError where it does not.
    """
    if within is not None and not within.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(within))
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        DISK.sync_folder(folder.parent)
    return path


def output_folder(path: Path) -> Path:
    """The folder of an output file that the user named, created where it is missing.

    Raises FluxrunError where the folder cannot be created, no file can be created in it (tried, since permissions say
    nothing for root), or `path` exists and is no regular file.
    """
    if path.exists() and not path.is_file():
        raise FluxrunError(f"{path}: cannot be written (it exists and is no regular file); name another")
    try:
        folder = make_folder(path.parent)
    except OSError as error:
        raise FluxrunError(f"{path}: cannot be written ({error.filename}: {error.strerror}); name another") from error
    partial = partial_path(path)
    try:
        DISK.close(DISK.create(partial))
        DISK.unlink(partial)
    except OSError as error:
        raise FluxrunError(f"{path}: cannot be written ({folder}: {error.strerror}); name another") from error
    return folder


def remove_partial_files(folder: Path) -> None:
    """Remove what interrupted writes left in the folder."""
    for stale in folder.glob(f".*{PARTIAL_SUFFIX}"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def replace_folder(staging: Path, path: Path) -> None:
    """Rename the finished folder `staging` to `path`, replacing the folder there."""
    old = path.with_name(f".{path.name}.old{PARTIAL_SUFFIX}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(staging, path)
    DISK.sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no such file, or no JSON object in it.

    Files written with durable=False may be empty after a power cut, and a run folder may be copied from anywhere.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
