"""The GPUs, memory and processor of this machine, from `nvidia-smi`, the driver's files and the kernel."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NVIDIA = Path("/proc/driver/nvidia/gpus")  # a folder per GPU, where the driver is loaded
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Gpu:
    """name: its number, as --gpus takes it. total, free: bytes. capability: CUDA's compute capability, e.g. 9.0."""

    name: str
    uuid: str
    model: str
    total: int
    free: int
    capability: float | None


def query_gpus() -> dict[str, Gpu] | None:
    """All GPUs of the machine, each by its number and by its UUID; None where `nvidia-smi` is missing or fails."""
    command = [
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total,memory.free,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        table = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    gpus: dict[str, Gpu] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 6 and cells[3].isdecimal() and cells[4].isdecimal():
            capability = float(cells[5]) if re.fullmatch(r"\d+\.\d+", cells[5]) else None
            gpu = Gpu(cells[0], cells[1], cells[2], int(cells[3]) << 20, int(cells[4]) << 20, capability)
            gpus |= {gpu.name: gpu, gpu.uuid: gpu}  # CUDA_VISIBLE_DEVICES may name either
    return gpus


def visible_gpu_id(number: str) -> str:
    """The machine's number or UUID of the GPU that has this number among the visible ones (CUDA_VISIBLE_DEVICES)."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names[int(number)] if int(number) < len(names) and names[int(number)] else number


def visible_gpu_count() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name and name != "-1"])
    return len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0


def memory_available() -> int | None:
    """Bytes of RAM and swap that this process may still use, within its container's limit; None where the kernel does
    not say."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
    if "MemAvailable" not in sizes:
        return None
    free = sizes["MemAvailable"] + sizes.get("SwapFree", 0)
    container = _container_memory()
    return free if container is None else min(free, container)


def _container_memory() -> int | None:
    """Bytes that the control group may still use; None where it has no limit.

    File pages that the kernel can drop do not count as used.
    """
    try:
        limit, used = (CGROUP / "memory.max").read_text().strip(), int((CGROUP / "memory.current").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    file_pages = sum(int(line.split()[1]) for line in lines if line.split()[0] in ("active_file", "inactive_file"))
    return int(limit) - max(0, used - file_pages) if limit.isdecimal() else None


def device_name(*, on_gpu: bool) -> str:
    """The models of all GPUs, by the driver; or the CPU's model and how many cores this process may use."""
    if on_gpu:
        texts = [path.read_text() for path in sorted(NVIDIA.glob("*/information"))]
        lines = [line for text in texts for line in text.splitlines()]
        names = {line.partition(":")[2].strip() for line in lines if line.startswith("Model:")}
        return ", ".join(sorted(names)) or "GPU"
    with suppress(OSError, StopIteration):
        line = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("model name"))
        return f"{line.partition(':')[2].strip()} x {len(os.sched_getaffinity(0))}"
    return f"CPU x {os.cpu_count()}"
