"""Where runs can go on this machine. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from runner.engine.local import Slot

NVIDIA = Path("/proc/driver/nvidia/gpus")


def make_slots(gpus: str | None, count: int, most_gpus: int) -> list[Slot]:
    """One slot per GPU; where a run asks for several, one slot with all of them; on a CPU `count` slots.

    gpus: as typed; `most_gpus`: of any run of the queue. Raises ValueError with what is wrong with it.
    """
    if gpus is None:
        gpus = ",".join(map(str, range(visible_gpus())))
    if gpus in ("cpu", ""):
        return [Slot(gpus or None) for _ in range(count)]
    names = gpus.split(",")
    if not all(name.isdecimal() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"wanted are GPU numbers, e.g. 0,1, each once, or `cpu` (found {gpus!r})")
    if count > 1:
        raise ValueError("every GPU is one slot; --slots is for --gpus cpu")
    return [Slot(gpus)] if most_gpus > 1 else [Slot(name) for name in names]


def visible_gpus() -> int:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        return len([name for name in seen.split(",") if name and name != "-1"])
    return len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0
