"""The one place that knows which device there is: dtypes, autocast, copies, freeing, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from runner.errors import FluxrunError

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
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
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a write per buffer
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.cuda.set_device(device)


def settle_libraries() -> None:
    """Import what a run will import and take it out of the garbage collector's way: half a million objects, which every
    collection between phases would walk through. To be called before any model is loaded, else that stays for ever too.
    """
    import diffusers
    import peft
    import transformers

    for name in ("FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "T5EncoderModel", "AutoTokenizer"):
        getattr(transformers, name)
    assert peft.LoraConfig
    gc.collect()
    gc.freeze()


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


def copy_out(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory. From a GPU all of them are under way before the host waits, once, for the last."""
    copies = {}
    for name, tensor in tensors.items():
        on_gpu = tensor.device.type == "cuda"
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        copies[name].copy_(tensor.detach(), non_blocking=on_gpu)
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def release(device: torch.device) -> None:
    """Give back what dropped modules held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):  # glibc keeps what was freed; others have no such call
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # resets VmHWM, see proc(5)


def held_memory(device: torch.device) -> int:
    """Bytes now, of the same kind as `peak_memory`: so before any model is there, what the libraries take."""
    release(device)
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS") if STATUS.exists() else 0


def peak_memory(device: torch.device) -> int:
    """Bytes since `reset_peak`: the most the GPU allocator held, or on a CPU the most this process had resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if CLEAR_REFS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    """A line of proc(5)'s status, which is in KiB, in bytes."""
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
