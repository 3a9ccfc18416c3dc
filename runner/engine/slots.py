"""Slots: the GPUs, or shares of the CPU, that train one run at a time each. File locks keep several queues apart."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from runner.core import files
from runner.core.hardware import visible_gpu_count, visible_gpu_id
from runner.core.locks import acquire_lock, lock_holder


@dataclass
class Slot:
    """gpus: as --gpus takes them; None leaves the choice to torch. locks: files to lock before the slot may be used.
    handles: of the locks that this queue holds."""

    gpus: str | None
    locks: tuple[Path, ...]
    handles: list[int] = field(default_factory=list)

    def take(self) -> bool:
        """Lock the slot for this queue. False where another queue holds it or one of its GPUs."""
        if self.handles:
            return True
        for lock in self.locks:
            files.make_folder(lock.parent)
            if (handle := acquire_lock(lock)) is None:
                self.release()
                return False
            self.handles.append(handle)
        return True

    def release(self) -> None:
        while self.handles:
            os.close(self.handles.pop())

    def holder(self) -> int | None:
        """The process that holds the slot, if it is another one than this."""
        return next((pid for lock in self.locks if (pid := lock_holder(lock)) not in (None, os.getpid())), None)

    @property
    def title(self) -> str:
        return f"GPU {self.gpus}" if self.gpus not in (None, "cpu") else "the CPU"


def make_slots(gpus: str | None, count: int, gpus_per_run: int, runs_folder: Path) -> list[Slot]:
    """One slot per GPU; where a run needs several GPUs, one slot with all of them; on a CPU, `count` slots.

    gpus: as typed. gpus_per_run: the most that any run of the queue asks for. GPUs are locked for the whole machine, a
    CPU's slots within one runs folder. Raises ValueError with what is wrong with `gpus`.
    """
    if gpus is None:
        gpus = ",".join(map(str, range(visible_gpu_count())))
    if gpus in ("cpu", ""):
        return [Slot(gpus or None, (runs_folder / ".slots" / f"cpu-{number}",)) for number in range(count)]
    names = gpus.split(",")
    if not all(name.isdecimal() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"expected GPU numbers such as 0,1, each once, or `cpu`, got {gpus!r}")
    if count > 1:
        raise ValueError("every GPU is one slot; --slots is for --gpus cpu")
    folder = Path(tempfile.gettempdir()) / f"fluxrun-gpus-{os.getuid()}"
    locks = {name: folder / visible_gpu_id(name) for name in names}
    return [Slot(gpus, tuple(locks.values()))] if gpus_per_run > 1 else [Slot(name, (locks[name],)) for name in names]


def on_gpus(slots: Iterable[Slot]) -> bool:
    """Whether any slot is a GPU."""
    return any(slot.gpus not in (None, "cpu") for slot in slots)
