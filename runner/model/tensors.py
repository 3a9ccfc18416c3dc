"""Torch tensors in safetensors files that carry their own digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runner.core import files, safetensors
from runner.core.errors import BadFileError

NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
DIGEST = "sha256"


def raw(tensor: Tensor) -> safetensors.RawTensor:
    """A tensor's dtype, shape and bytes, in host memory."""
    host = tensor.detach().cpu().contiguous()
    data = host.reshape(-1).view(torch.uint8).numpy().data if host.numel() else memoryview(b"")
    return safetensors.RawTensor(NAMES[host.dtype], tuple(host.shape), memoryview(data))


def save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, disk: files.Disk = files.DISK
) -> None:
    """Write one file, whole or not at all, with a digest of tensors and metadata in its header. Raises OSError."""
    raws = {name: raw(tensor) for name, tensor in tensors.items()}
    safetensors.write_tensors(path, raws, {**metadata, DIGEST: safetensors.tensors_digest(raws, metadata)}, disk=disk)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file, verified. Raises BadFileError where any bit differs from what was written;
    safetensors itself checks the file's structure alone.

    The tensors are copies: safetensors' own are views of the file, and would show later changes of it.
    """
    metadata = safetensors.read_metadata(path)
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: _copy(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118 - not iterable
        raws = {name: raw(tensor) for name, tensor in tensors.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise BadFileError(f"{path}: not a whole safetensors file ({error})") from error
    except KeyError as error:
        raise BadFileError(f"{path}: a dtype that fluxrun never writes ({error})") from error
    digest = metadata.pop(DIGEST, "none")
    if safetensors.tensors_digest(raws, metadata) != digest:
        raise BadFileError(
            f"{path}: the content does not match its digest; the file was changed or damaged after writing"
        )
    return tensors, metadata


def _copy(tensor: Tensor) -> Tensor:
    """Through numpy: torch's copy starts OpenMP workers in the thread it runs in, and those of the writer's thread
    would spin on the cores that train."""
    copy = torch.empty_like(tensor)
    if copy.numel():
        copy.reshape(-1).view(torch.uint8).numpy()[:] = tensor.reshape(-1).view(torch.uint8).numpy()
    return copy


def verified(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a large file, one by one in the order of names, as copies; no more than one is in memory at a
    time.

    Raises BadFileError after the last one where the digest does not match: until then the values are not verified.
    """
    metadata = safetensors.read_metadata(path)
    digest = metadata.pop(DIGEST, "none")
    try:
        with safe_open(path, framework="pt") as opened:
            names = sorted(opened.keys())
        computed = hashlib.sha256(safetensors.digest_head(metadata))
        for name in names:
            with safe_open(
                path, framework="pt"
            ) as opened:  # for each: pages read through it count as this process' memory
                tensor = opened.get_tensor(name).clone()
            for chunk in safetensors.digest_chunks(name, raw(tensor)):
                computed.update(chunk)
            yield name, tensor
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadFileError(f"{path}: not a whole safetensors file ({error})") from error
    if computed.hexdigest() != digest:
        raise BadFileError(
            f"{path}: the content does not match its digest; the file was changed or damaged after writing"
        )
