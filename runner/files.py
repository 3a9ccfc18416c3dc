"""Files that are either whole or not there: write aside, fsync, rename; safetensors bytes; locks.

No torch here: tensors come in as (dtype name, shape, bytes). Every operation of a durable write goes through a `Disk`,
so that a test can log them, let one fail, or die between two.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from runner.errors import BadFile, FluxrunError, Held, disk_trouble

MAX_HEADER = 100_000_000  # bytes; the format's own limit
ASIDE = ".partial"  # a stale side file is overwritten or swept, never trusted


class Raw(NamedTuple):
    """One tensor as stored: safetensors dtype name ("F32", "BF16", ...), shape, little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def sha256(chunks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def aside_of(path: Path) -> Path:
    """Where a file is written before it gets its name: of this process, since two may fill one cache entry."""
    return path.with_name(f".{path.name}.{os.getpid()}{ASIDE}")


def write_bytes(path: Path, chunks: Iterable[bytes | memoryview], *, durable: bool = True, disk: Disk = DISK) -> None:
    """Write `path` so that a reader sees the old content or the new, never a part.

    durable=False leaves out both fsyncs: for files like the heartbeat, that are worthless after a power cut. What
    cannot be written whole leaves nothing: after a failed fsync the pages may be lost, so the attempt is discarded.
    """
    aside = aside_of(path)
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
def if_there_is_room() -> Iterator[None]:
    """For what is only told: a full or failing disk, or a folder that is gone, stops a run where it would lose something,
    not at a message."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if not disk_trouble(error):
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


def folder_for(path: Path) -> Path:
    """The folder of an output that a user named, made where it is not there. Raises FluxrunError where the folder cannot be
    made, no file can be created in it (which root is told only by trying), or `path` is a device or the like."""
    if path.exists() and not path.is_file():
        raise FluxrunError(f"{path}: cannot be written (it exists and is no regular file); name another")
    try:
        folder = make_folder(path.parent)
    except OSError as error:
        raise FluxrunError(f"{path}: cannot be written ({error.filename}: {error.strerror}); name another") from error
    aside = aside_of(path)
    try:
        DISK.close(DISK.create(aside))
        DISK.unlink(aside)
    except OSError as error:
        raise FluxrunError(f"{path}: cannot be written ({folder}: {error.strerror}); name another") from error
    return folder


def tensors_digest(tensors: Mapping[str, Raw], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata and all names, dtypes, shapes and bytes, in the order of names."""

    def chunks() -> Iterator[bytes | memoryview]:
        yield digest_head(metadata)
        for name in sorted(tensors):
            yield from digest_chunks(name, tensors[name])

    return sha256(chunks())


def digest_head(metadata: Mapping[str, str]) -> bytes:
    return json.dumps(sorted(metadata.items())).encode()


def digest_chunks(name: str, raw: Raw) -> Iterator[bytes | memoryview]:
    yield json.dumps([name, raw.dtype, list(raw.shape), raw.data.nbytes]).encode()
    yield raw.data


def write_tensors(path: Path, tensors: Mapping[str, Raw], metadata: Mapping[str, str], *, disk: Disk = DISK) -> None:
    """Write a safetensors file; equal content gives equal bytes.

    The library's own writer orders the metadata by a random hash, which would make two equal exports differ.
    Format: https://github.com/huggingface/safetensors#format (8 bytes length, JSON header padded to 8, data).
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    names = _order(tensors)
    offset = 0
    for name in names:
        raw = tensors[name]
        header[name] = {"dtype": raw.dtype, "shape": raw.shape, "data_offsets": [offset, offset + raw.data.nbytes]}
        offset += raw.data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_bytes(path, [struct.pack("<Q", len(text)), text, *(tensors[name].data for name in names)], disk=disk)


def data_digest(tensors: Mapping[str, Raw]) -> str:
    """SHA-256 of what `write_tensors` writes behind the header: the hash that WebUIs know a LoRA by."""
    return sha256(tensors[name].data for name in _order(tensors))


def _order(tensors: Mapping[str, Raw]) -> list[str]:
    return sorted(tensors, key=lambda name: (-_width(tensors[name].dtype), name))  # wide first keeps all aligned


def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)  # F8_E4M3 has more digits
    return int(bits[0]) if bits else 8


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Raises BadFile."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(path.stat().st_size, MAX_HEADER):
                raise ValueError("header longer than the file, or than any that is written")
            metadata = json.loads(file.read(length))["__metadata__"]
            return {str(key): str(value) for key, value in metadata.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise BadFile(f"{path}: no readable safetensors header ({error})") from error


def sweep_aside(folder: Path) -> None:
    """Remove what an interrupted write left."""
    for stale in folder.glob(f".*{ASIDE}"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def replace_folder(aside: Path, path: Path) -> None:
    """Put the finished folder `aside` in the place of `path`."""
    old = path.with_name(f".{path.name}.old{ASIDE}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(aside, path)
    DISK.sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path, patience: float = 1.0, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock, which dies with this process; a second holder is refused (Held) with the first one's pid.

    `patience` seconds are waited, since `is_locked` holds the lock for an instant too; `waiting` is called meanwhile.
    """
    deadline = time.monotonic() + patience
    while (handle := take_lock(path)) is None:
        if time.monotonic() > deadline:
            who = lock_holder(path) or "unknown"
            raise Held(f"{path.parent}: process {who} is working on it; wait for it, or stop it")
        waiting()
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(handle)


def take_lock(path: Path) -> int | None:
    """A handle that holds the lock until it is closed, or this process dies; None where another process holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    if not _try_lock(handle):
        os.close(handle)
        return None
    with if_there_is_room():  # for the lock there always is; only its holder may stay nameless
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def lock_holder(path: Path) -> int | None:
    """The pid of the process that holds the lock, where it could write that down."""
    if not is_locked(path):
        return None
    text = path.read_text(errors="replace").strip()
    return int(text) if text.isdecimal() else None


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock now."""
    if not path.is_file():
        return False
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return not _try_lock(handle)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
