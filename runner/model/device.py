"""The one place that knows which device there is: dtypes, autocast, copies, freeing, peak memory."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from runner.core.errors import FluxrunError
from runner.spec.dtypes import Dtype, base_dtype

TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(gpus: str | None) -> torch.device:
    """The device of this process: "cpu", a GPU's number, or None for the first GPU if there is one."""
    if gpus == "cpu" or (gpus is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise FluxrunError(
            f"--gpus {gpus}: this machine shows torch no CUDA GPU; use --gpus cpu, or install a CUDA torch"
        )
    return torch.device("cuda", int((gpus or "0").split(",")[0]))


def prepare_device(device: torch.device, *, tf32: bool) -> None:
    """Process-wide settings: repeatable kernels, and TF32 matmuls where the spec allows them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_folder()))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a write per buffer
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.cuda.set_device(device)


def compiled_folder() -> Path:
    """Where torch keeps what model.compile made, Triton's kernels too, over a restart of the machine. The user's own folder, not
    the runs': it holds code and pickles, which nobody should get with a folder of runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fluxrun" / "compile"


def preload_libraries() -> None:
    """Import what a run will import and take it out of the garbage collector's way: half a million objects, which every
    collection between phases would walk through. To be called before any model is loaded, else that stays for ever too.
    """
    # which they would import wherever it is installed, and torch's compiler with it, for layers that nobody asks for
    with _hide_module("bitsandbytes"):
        import diffusers
        import peft
        import transformers
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        for ask in (
            is_bnb_available,
            is_bnb_4bit_available,
        ):  # which are remembered; else the first adapter would import it
            ask()
        for name in ("FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL"):
            getattr(diffusers, name)
        for name in ("CLIPTextModel", "T5EncoderModel", "AutoTokenizer"):
            getattr(transformers, name)
        assert peft.LoraConfig
    gc.collect()
    gc.freeze()
    gc.enable()


@contextmanager
def _hide_module(name: str) -> Iterator[None]:
    """A module that cannot be imported within; it can be again afterwards. Not where it was already, or where a library has
    seen that it is there."""
    if {name, "diffusers", "transformers", "peft"} & sys.modules.keys():
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # what `import` takes for absent
    try:
        yield
    finally:
        del sys.modules[name]


def resolve_dtype(name: Dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of the frozen base."""
    return DTYPES[base_dtype(name, on_gpu=device.type == "cuda")]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matmuls in `dtype` while trainable parameters stay fp32; nothing at all in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def move_module(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without making the host wait (pinned, asynchronous on CUDA)."""
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return pin_memory(tensor, device).to(device, non_blocking=True)


def pin_memory(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """In memory that the device can copy from by itself, where it is a GPU."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_pinned(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers in host memory, from where `Lane` can copy while the device computes."""
    host = tensor.detach().cpu()
    return host.pin_memory() if device.type == "cuda" else host


@dataclass(frozen=True)
class PendingCopy:
    """Tensors on their way to the device; they are there, for what is computed from then on, after `wait`."""

    tensors: list[torch.Tensor]
    event: torch.cuda.Event | None

    def wait(self) -> list[torch.Tensor]:
        if self.event is not None:
            torch.cuda.current_stream(self.tensors[0].device).wait_event(self.event)
        return self.tensors


class CopyStream:
    """Copies to the device beside the computation: by a stream of its own on CUDA; elsewhere at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def send(self, hosts: Sequence[torch.Tensor]) -> PendingCopy:
        """The memory is the computing stream's, which frees it too: so the copy begins after what computes in it now, and
        nothing may let go of it before `wait`."""
        made = [torch.empty_like(host, device=self.device) for host in hosts]
        if self.stream is None:
            for tensor, host in zip(made, hosts, strict=True):
                tensor.copy_(host)
            return PendingCopy(made, None)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for tensor, host in zip(made, hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
            return PendingCopy(made, self.stream.record_event())


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
    """Give back what dropped modules held. glibc keeps freed memory for itself unless it is asked: half of a phase's peak."""
    gc.collect()
    if TRIM is not None:
        TRIM(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_in_use(device: torch.device) -> int:
    """Bytes of this process: those of live tensors on a GPU, or what is resident and no file's on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _status("RssAnon")


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
