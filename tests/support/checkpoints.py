"""What the storage tests save and load: a small checkpoint whose every value tells its step, the real writer, and the
loader of a starting run."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from runner.checkpoint.storage import Checkpoint, Weights, named_tensors
from runner.checkpoint.writer import Writer
from runner.core import files
from runner.core.events import EventLog
from runner.runs.checkpoint_files import checkpoint_name
from runner.runs.run import Run
from runner.training.run import newest_checkpoint

STEPS = (10, 20, 30, 40, 50)
PIVOTS = (20,)  # kept always, as the end of a phase is
MEMORY = Path("/dev/shm")  # syncing costs nothing there; what must be on a real disk says so


def made(step: int, size: int = 900) -> Checkpoint:
    """About 4 * `size` bytes: not aligned to any block."""
    values = torch.arange(size // 3, dtype=torch.float32) + step
    weights = Weights({"a": values, "b": -values}, {"clip": values[:7] * 2})
    return Checkpoint("joint", "key", step, weights, {"lora/a/exp_avg": values / 3}, {"d": step / 7})


def whole(found: Checkpoint, size: int = 900) -> bool:
    """Whether it is that step's, to the last bit."""
    wanted = made(found.step, size)
    ours, theirs = named_tensors(wanted), named_tensors(found)
    return (
        (found.phase, found.phase_key, found.scalars) == (wanted.phase, wanted.phase_key, wanted.scalars)
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


@cache
def memory() -> Path:
    """A folder of this process, gone with it."""
    folder = Path(tempfile.mkdtemp(prefix="fluxrun-tests-", dir=MEMORY if MEMORY.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def new_run(parent: Path | None = None) -> Run:
    """An empty run folder, in memory where no place is named."""
    run = Run(Path(tempfile.mkdtemp(prefix="run-", dir=parent or memory())), "a")
    run.checkpoints.mkdir(parents=True)
    return run


def newest(run: Run, lines: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """What a run that starts now would go on from: the real loader, with its fallback and quarantine."""
    plan: Any = SimpleNamespace(training=[SimpleNamespace(key="key", stop=99)], steps=99)
    return newest_checkpoint(run, plan, EventLog(lambda event: lines(str(event.get("text")))))


class Roomy(files.Disk):
    """The real disk, where the check before the write does not see how full it is: the room goes meanwhile."""

    def free(self, folder: Path) -> int:
        return 1 << 40


def writer(
    run: Run, *, keep: int = 1, disk: files.Disk | None = None, log: Callable[[str], None] = lambda _: None,
    kind: type[Writer] = Writer, pivots: Collection[int] = PIVOTS,
) -> Writer:  # fmt: skip
    return kind(run.checkpoints, keep, pivots, lambda: None, log, disk or files.DISK)


def acknowledged(line: str) -> int:
    """The step that a line of the writer's log says is saved; 0 where it says something else."""
    return int(line.removeprefix("checkpoint at step ")) if line.startswith("checkpoint at step ") else 0


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def encoded(checkpoint: Checkpoint) -> bytes:
    """Its file."""
    from runner.checkpoint.storage import write

    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        path = Path(folder) / checkpoint_name(checkpoint.step)
        write(path, checkpoint)
        return path.read_bytes()
