"""The one place that knows which device there is: dtypes, autocast, copies, freeing, peak memory."""

from __future__ import annotations

import gc
import resource
from contextlib import AbstractContextManager, nullcontext

import torch

from runner.errors import FluxrunError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose(gpus: str | None) -> torch.device:
    """The device of this process: "cpu", a GPU's number, or None for the first GPU if there is one."""
    if gpus == "cpu" or (gpus is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise FluxrunError(
            f"--gpus {gpus}: this machine shows torch no CUDA GPU; use --gpus cpu, or install a CUDA torch"
        )
    return torch.device("cuda", int((gpus or "0").split(",")[0]))


def prepare(device: torch.device, *, tf32: bool) -> None:
    """Process-wide settings: repeatable kernels, and TF32 matmuls where the spec allows them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a write per buffer
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = False


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of the frozen base. bf16 halves a GPU's memory; on a CPU it is several times slower than fp32."""
    return DTYPES[name or ("bf16" if device.type == "cuda" else "fp32")]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matmuls in `dtype` while trainable parameters stay fp32; nothing at all in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without making the host wait (pinned, asynchronous on CUDA)."""
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def release(device: torch.device) -> None:
    """Give back what dropped modules held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the GPU allocator held, or the most this process ever had resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
