"""Torch tensors to and from safetensors files that carry their own digest."""

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
    """The bytes of a tensor, in host memory."""
    host = tensor.detach().cpu().contiguous()
    data = host.reshape(-1).view(torch.uint8).numpy().data if host.numel() else memoryview(b"")
    return safetensors.RawTensor(NAMES[host.dtype], tuple(host.shape), memoryview(data))


def save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, disk: files.Disk = files.DISK
) -> None:
    """Write one file, whole or not at all, with a digest of tensors and metadata in its header."""
    raws = {name: raw(tensor) for name, tensor in tensors.items()}
    safetensors.write_tensors(path, raws, {**metadata, DIGEST: safetensors.tensors_digest(raws, metadata)}, disk=disk)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read and verify. Raises BadFileError where a bit is not as it was written: safetensors itself checks only the shape
    of the file, and loads a flipped bit without a word. Copies: safetensors' own tensors are views of the file, which
    would show what happens to it after it was verified."""
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
    """By numpy: torch's own copy starts OpenMP workers in whatever thread it runs, and those of a writer's thread would spin
    on the cores that train."""
    made = torch.empty_like(tensor)
    if made.numel():
        made.reshape(-1).view(torch.uint8).numpy()[:] = tensor.reshape(-1).view(torch.uint8).numpy()
    return made


def verified(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a large file one by one, copies, in the order of names; what they are is only known to be right after
    the last one, when BadFileError is raised where it is not. At no moment is more than one in memory on the file's account."""
    metadata = safetensors.read_metadata(path)
    digest = metadata.pop(DIGEST, "none")
    try:
        with safe_open(path, framework="pt") as opened:
            names = sorted(opened.keys())
        found = hashlib.sha256(safetensors.digest_head(metadata))
        for name in names:
            with safe_open(path, framework="pt") as opened:  # anew: pages that were read count as this process' memory
                tensor = opened.get_tensor(name).clone()
            for chunk in safetensors.digest_chunks(name, raw(tensor)):
                found.update(chunk)
            yield name, tensor
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadFileError(f"{path}: not a whole safetensors file ({error})") from error
    if found.hexdigest() != digest:
        raise BadFileError(
            f"{path}: the content does not match its digest; the file was changed or damaged after writing"
        )
