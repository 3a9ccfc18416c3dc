"""Torch tensors to and from safetensors files that carry their own digest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runner import files
from runner.errors import BadFile

NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
DIGEST = "sha256"


def raw(tensor: Tensor) -> files.Raw:
    """The bytes of a tensor, in host memory."""
    host = tensor.detach().cpu().contiguous()
    data = host.reshape(-1).view(torch.uint8).numpy().data if host.numel() else memoryview(b"")
    return files.Raw(NAMES[host.dtype], tuple(host.shape), memoryview(data))


def save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, disk: files.Disk = files.DISK
) -> None:
    """Write one file, whole or not at all, with a digest of tensors and metadata in its header."""
    raws = {name: raw(tensor) for name, tensor in tensors.items()}
    files.write_tensors(path, raws, {**metadata, DIGEST: files.tensors_digest(raws, metadata)}, disk=disk)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read and verify. Raises BadFile where a bit is not as it was written: safetensors itself checks only the shape
    of the file, and loads a flipped bit without a word. Copies: safetensors' own tensors are views of the file, which
    would show what happens to it after it was verified."""
    metadata = files.read_metadata(path)
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - not iterable
        raws = {name: raw(tensor) for name, tensor in tensors.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise BadFile(f"{path}: not a whole safetensors file ({error})") from error
    except KeyError as error:
        raise BadFile(f"{path}: a dtype that fluxrun never writes ({error})") from error
    digest = metadata.pop(DIGEST, "none")
    if files.tensors_digest(raws, metadata) != digest:
        raise BadFile(f"{path}: the content does not match its digest; the file was changed or damaged after writing")
    return tensors, metadata
