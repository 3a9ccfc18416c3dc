"""The device of this process: choice and settings, dtypes, autocast, copies, freeing, memory in use and its peak."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from runner.core.errors import FluxrunError
from runner.core.user_cache import user_cache
from runner.spec.dtypes import Dtype, base_dtype

TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(gpus: str | None) -> torch.device:
    """gpus: "cpu", the number of a GPU (of several, the first), or None: the first GPU if there is one, else the CPU.
    Raises FluxrunError where a GPU is asked for and torch sees none."""
    if gpus == "cpu" or (gpus is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise FluxrunError(
            f"--gpus {gpus}: this machine shows torch no CUDA GPU; use --gpus cpu, or install a CUDA torch"
        )
    return torch.device("cuda", int((gpus or "0").split(",")[0]))


def prepare_device(device: torch.device, *, tf32: bool) -> None:
    """Process-wide settings: deterministic kernels, and TF32 matrix products where the spec allows them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_folder()))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a write per buffer
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.cuda.set_device(device)


def compiled_folder() -> Path:
    """Where torch keeps compiled code and Triton's kernels between processes. In the user's cache, not in the runs
    folder: it holds code and pickles, which must not travel with a folder of runs."""
    return user_cache() / "compile"


def resolve_dtype(name: Dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of the frozen base."""
    return DTYPES[base_dtype(name, on_gpu=device.type == "cuda")]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `dtype` while trainable parameters stay fp32. In fp32 it does nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device; on CUDA from pinned memory, so the host does not wait."""
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return pin_memory(tensor, device).to(device, non_blocking=True)


def pin_memory(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor in pinned memory, which a GPU copies from without the host. On a CPU the tensor itself."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_pinned(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in host memory from which `CopyStream` copies while the device computes."""
    host = tensor.detach().cpu()
    return host.pin_memory() if device.type == "cuda" else host


@dataclass(frozen=True)
class PendingCopy:
    """Tensors being copied to the device. What is computed after `wait` sees them there."""

    tensors: list[torch.Tensor]
    event: torch.cuda.Event | None

    def wait(self) -> list[torch.Tensor]:
        """Make the computing stream wait for the copy; the host does not wait."""
        if self.event is not None:
            torch.cuda.current_stream(self.tensors[0].device).wait_event(self.event)
        return self.tensors


class CopyStream:
    """Copies to the device while it computes: on CUDA in a stream of its own, elsewhere at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, hosts: Sequence[torch.Tensor]) -> PendingCopy:
        """Start copying pinned tensors.

        The memory is allocated in the computing stream, which also frees it. So the copy starts after what that stream
        is computing now, and the result must be kept until `wait`.
        """
        copies = [torch.empty_like(host, device=self.device) for host in hosts]
        if self.stream is None:
            for tensor, host in zip(copies, hosts, strict=True):
                tensor.copy_(host)
            return PendingCopy(copies, None)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for tensor, host in zip(copies, hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
            return PendingCopy(copies, self.stream.record_event())


def copy_out(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory. From a GPU all copies start before the host waits, once, for the last."""
    copies = {}
    for name, tensor in tensors.items():
        on_gpu = tensor.device.type == "cuda"
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        copies[name].copy_(tensor.detach(), non_blocking=on_gpu)
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def release(device: torch.device) -> None:
    """Return the memory of dropped modules to the system. glibc keeps freed memory unless asked: half of a phase's
    peak."""
    gc.collect()
    if TRIM is not None:
        TRIM(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_in_use(device: torch.device) -> int:
    """Bytes of this process: on a GPU of live tensors; on a CPU of resident memory that is not a mapped file's."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _status("RssAnon")


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # resets VmHWM, see proc(5)


def held_memory(device: torch.device) -> int:
    """Bytes in use now, of the kind that `peak_memory` measures; before any model is loaded, the libraries' own."""
    release(device)
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS") if STATUS.exists() else 0


def peak_memory(device: torch.device) -> int:
    """Bytes, the highest since `reset_peak`: of tensors on the GPU, or on a CPU of this process's resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if CLEAR_REFS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status, which counts in KiB (proc(5))."""
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
