"""Real runs: their context before the first phase, their exports, and a stop at a chosen step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from runner.training.context import RunContext


def context_of(spec: Path) -> RunContext:
    """What `fluxrun queue` would set up for this one spec, before the first phase."""
    import torch

    from runner.cache.store import Cache
    from runner.core.events import EventLog
    from runner.jobs.prepare import prepare_jobs
    from runner.model import libraries
    from runner.training.context import RunContext, open_base
    from runner.training.distributed import Ranks

    libraries.quiet()
    [job] = prepare_jobs([spec], spec.parent / "runs", fetch=True, fresh=False)
    cache = Cache(spec.parent / "runs" / "cache")
    base = open_base(job.spec, torch.device("cpu"), cache)
    assert job.pictures is not None
    (spec.parent / "runs").mkdir(exist_ok=True)  # as the queue does
    return RunContext(job.spec, job.plan, job.pictures, base, cache, EventLog(), Ranks(), lambda: False)


Bytes = Callable[[Path], dict[str, bytes]]


def export_bytes(run: Path) -> dict[str, bytes]:
    """Every exported file and sample, by name."""
    found = {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.glob("export/**/*"))
        if path.is_file()
    }
    assert found, f"{run} exported nothing"
    return found


@contextmanager
def stopping_after(step: int) -> Iterator[None]:
    """Ask the run to stop, as a signal would, once it reports this step."""
    from runner.core import signals
    from runner.training import recorder

    reached: list[int] = []
    report, asked = recorder.RunRecorder.on_step, signals.StopRequest.__call__

    def reporting(self: Any, step_: Any, state: Any) -> None:
        reached.append(step_.number)
        report(self, step_, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder.RunRecorder, "on_step", reporting)
        patch.setattr(signals.StopRequest, "__call__", lambda self: asked(self) or step in reached)
        yield
