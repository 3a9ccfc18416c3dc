"""Files that are either whole or not there: write aside, fsync, rename; safetensors bytes; locks.

No torch here: tensors come in as (dtype name, shape, bytes), so the writer can be tested and replaced by itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from runner.errors import BadFile, Refused

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


def sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is synced."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, chunks: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
    """Write `path` so that a reader sees the old content or the new, never a part.

    durable=False leaves out both fsyncs: for files like the heartbeat, that are worthless after a power cut.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}{ASIDE}")  # two processes may fill one cache entry
    with aside.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(aside, path)
    if durable:
        sync_folder(path.parent)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    write_bytes(path, [text.encode()], durable=durable)


def write_json(path: Path, value: object, *, durable: bool = True) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n", durable=durable)


def write_png(path: Path, image: Any) -> None:
    """`image`: a PIL picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, [buffer.getvalue()])


def make_folder(path: Path) -> Path:
    """Create `path` and its parents, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)
    return path


def tensors_digest(tensors: Mapping[str, Raw], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata and all names, dtypes, shapes and bytes, in the order of names."""

    def chunks() -> Iterator[bytes | memoryview]:
        yield json.dumps(sorted(metadata.items())).encode()
        for name in sorted(tensors):
            raw = tensors[name]
            yield json.dumps([name, raw.dtype, list(raw.shape), raw.data.nbytes]).encode()
            yield raw.data

    return sha256(chunks())


def write_tensors(path: Path, tensors: Mapping[str, Raw], metadata: Mapping[str, str]) -> None:
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
    write_bytes(path, [struct.pack("<Q", len(text)), text, *(tensors[name].data for name in names)])


def data_digest(tensors: Mapping[str, Raw]) -> str:
    """SHA-256 of what `write_tensors` writes behind the header: the hash that WebUIs know a LoRA by."""
    return sha256(tensors[name].data for name in _order(tensors))


def _order(tensors: Mapping[str, Raw]) -> list[str]:
    return sorted(tensors, key=lambda name: (-_width(tensors[name].dtype), name))  # wide first keeps all aligned


def _width(dtype: str) -> int:
    return int("".join(filter(str.isdigit, dtype)) or 8)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Raises BadFile."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            metadata = json.loads(file.read(length))["__metadata__"]
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise BadFile(f"{path}: no readable safetensors header ({error})") from error
    return {str(key): str(value) for key, value in metadata.items()}


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
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path, patience: float = 1.0) -> Iterator[None]:
    """Hold an exclusive lock, which dies with this process; a second holder is refused with the first one's pid.

    `patience` seconds are waited, since `is_locked` holds the lock for an instant too.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + patience
        while not _try_lock(handle):
            if time.monotonic() > deadline:
                holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
                raise Refused(f"{path.parent}: process {holder} is working on this run; wait for it, or stop it")
            time.sleep(0.02)
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


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
