"""Where runs can go on this machine, one at a time on each; also across several queues. No torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from runner.core import files
from runner.core.hardware import seen, visible_gpus
from runner.core.locks import acquire_lock, lock_holder


@dataclass
class Slot:
    """gpus: as --gpus takes them; None leaves the choice to torch. locks: what a queue must hold to use the place."""

    gpus: str | None
    locks: tuple[Path, ...]
    held: list[int] = field(default_factory=list)

    def take(self) -> bool:
        """Whether the place is this queue's now; another queue may have it, or a part of it."""
        if self.held:
            return True
        for lock in self.locks:
            files.make_folder(lock.parent)
            if (handle := acquire_lock(lock)) is None:
                self.release()
                return False
            self.held.append(handle)
        return True

    def release(self) -> None:
        while self.held:
            os.close(self.held.pop())

    def user(self) -> int | None:
        """The process that has it, if not this one."""
        return next((pid for lock in self.locks if (pid := lock_holder(lock)) not in (None, os.getpid())), None)

    @property
    def title(self) -> str:
        return f"GPU {self.gpus}" if self.gpus not in (None, "cpu") else "the CPU"


def make_slots(gpus: str | None, count: int, most_gpus: int, runs: Path) -> list[Slot]:
    """One slot per GPU; where a run asks for several, one slot with all of them; on a CPU `count` slots.

    gpus: as typed; `most_gpus`: of any run of the queue. A GPU is shared by all runs folders of the machine, a CPU's
    slots count within one. Raises ValueError with what is wrong with `gpus`.
    """
    if gpus is None:
        gpus = ",".join(map(str, range(visible_gpus())))
    if gpus in ("cpu", ""):
        return [Slot(gpus or None, (runs / ".slots" / f"cpu-{number}",)) for number in range(count)]
    names = gpus.split(",")
    if not all(name.isdecimal() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"expected GPU numbers such as 0,1, each once, or `cpu`, got {gpus!r}")
    if count > 1:
        raise ValueError("every GPU is one slot; --slots is for --gpus cpu")
    folder = Path(tempfile.gettempdir()) / f"fluxrun-gpus-{os.getuid()}"
    locks = {name: folder / seen(name) for name in names}
    return [Slot(gpus, tuple(locks.values()))] if most_gpus > 1 else [Slot(name, (locks[name],)) for name in names]


def on_gpus(places: Iterable[Slot]) -> bool:
    return any(place.gpus not in (None, "cpu") for place in places)
