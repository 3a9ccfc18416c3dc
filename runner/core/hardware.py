"""The GPUs, memory and processor of this machine, from `nvidia-smi`, the driver's files and the kernel."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes; capability: CUDA's compute capability, e.g. 9.0."""

    name: str
    uuid: str
    model: str
    total: int
    free: int
    capability: float | None


def gpus_here() -> dict[str, Gpu] | None:
    """By number and by id; None where `nvidia-smi` cannot be asked."""
    ask = [
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total,memory.free,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found: dict[str, Gpu] = {}
    for line in said.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 6 and cells[3].isdecimal() and cells[4].isdecimal():
            capability = float(cells[5]) if re.fullmatch(r"\d+\.\d+", cells[5]) else None
            gpu = Gpu(cells[0], cells[1], cells[2], int(cells[3]) << 20, int(cells[4]) << 20, capability)
            found |= {gpu.name: gpu, gpu.uuid: gpu}  # CUDA_VISIBLE_DEVICES may name either
    return found


def memory_available() -> int | None:
    """Bytes of RAM and swap that are free to this process, or None where the kernel does not say."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    facts = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
    if "MemAvailable" not in facts:
        return None
    free = facts["MemAvailable"] + facts.get("SwapFree", 0)
    return min(free, *(limit - used for limit, used in _container())) if _container() else free


MEMINFO = Path("/proc/meminfo")


def _container() -> list[tuple[int, int]]:
    """(limit, used without what can be dropped) of the control group, where it has a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return []
    files = sum(int(line.split()[1]) for line in lines if line.split()[0] in ("active_file", "inactive_file"))
    return [(int(limit), max(0, used - files))] if limit.isdecimal() else []


NVIDIA = Path("/proc/driver/nvidia/gpus")


def seen(number: str) -> str:
    """A GPU's own number or id, where the user lets only some be seen (CUDA_VISIBLE_DEVICES)."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names[int(number)] if int(number) < len(names) and names[int(number)] else number


def visible_gpus() -> int:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([name for name in shown.split(",") if name and name != "-1"])
    return len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0


CPUINFO = Path("/proc/cpuinfo")


def device_name(*, on_gpu: bool) -> str:
    """The driver's name of the GPUs, or the CPU's and how many of them this process may use."""
    if on_gpu:
        told = [path.read_text() for path in sorted(NVIDIA.glob("*/information"))]
        names = {line.partition(":")[2].strip() for text in told for line in text.splitlines() if line[:6] == "Model:"}
        return ", ".join(sorted(names)) or "GPU"
    with suppress(OSError, StopIteration):
        line = next(one for one in CPUINFO.read_text().splitlines() if one.startswith("model name"))
        return f"{line.partition(':')[2].strip()} x {len(os.sched_getaffinity(0))}"
    return f"CPU x {os.cpu_count()}"
