"""safetensors files as bytes: written in a fixed order, hashed, and their headers read without the data.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from runner.core.errors import BadFileError
from runner.core.files import DISK, Disk, write_bytes
from runner.core.hashing import sha256

MAX_HEADER = 100_000_000  # bytes; the format's own limit


class RawTensor(NamedTuple):
    """One tensor as stored: safetensors dtype name ("F32", "BF16", ...), shape, little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def tensors_digest(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata and of all names, dtypes, shapes and bytes, in the order of names."""

    def chunks() -> Iterator[bytes | memoryview]:
        yield digest_head(metadata)
        for name in sorted(tensors):
            yield from digest_chunks(name, tensors[name])

    return sha256(chunks())


def digest_head(metadata: Mapping[str, str]) -> bytes:
    """What `tensors_digest` hashes of the metadata."""
    return json.dumps(sorted(metadata.items())).encode()


def digest_chunks(name: str, raw: RawTensor) -> Iterator[bytes | memoryview]:
    """What `tensors_digest` hashes of one tensor."""
    yield json.dumps([name, raw.dtype, list(raw.shape), raw.data.nbytes]).encode()
    yield raw.data


def write_tensors(
    path: Path, tensors: Mapping[str, RawTensor], metadata: Mapping[str, str], *, disk: Disk = DISK
) -> None:
    """Write a safetensors file; equal content gives equal bytes.

    The library's own writer orders the metadata by a random hash, so two equal exports would differ.
    A file is 8 bytes of header length, the JSON header padded to a multiple of 8 bytes, and the data.
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


def data_digest(tensors: Mapping[str, RawTensor]) -> str:
    """SHA-256 of the data that `write_tensors` writes after the header. WebUIs identify a LoRA by it."""
    return sha256(tensors[name].data for name in _order(tensors))


def _order(tensors: Mapping[str, RawTensor]) -> list[str]:
    """Names in the order of the file: widest dtype first, which keeps every tensor aligned."""
    return sorted(tensors, key=lambda name: (-_width(tensors[name].dtype), name))


def _width(dtype: str) -> int:
    """Bits per value, e.g. of "F32"; the first number counts, as in "F8_E4M3"."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) if bits else 8


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Raises BadFileError."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(path.stat().st_size, MAX_HEADER):
                raise ValueError("header longer than the file, or than the format allows")
            metadata = json.loads(file.read(length))["__metadata__"]
            return {str(key): str(value) for key, value in metadata.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise BadFileError(f"{path}: no readable safetensors header ({error})") from error
