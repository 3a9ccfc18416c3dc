"""Workers that do what a test says, in no time: for the rules by which a queue goes on, which are not about
training."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runner.core.errors import ExitCode
from runner.core.files import make_folder
from runner.engine import slot_filling, supervisor
from runner.runs.checkpoint_files import checkpoint_name
from runner.runs.run import Run

PATIENCE = 5000  # looks at a worker that nobody ends


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run: a checkpoint at step `saves` is written, `then` is called, `steps` (seconds each) are
    reported, and the worker ends with `code` and `reason`. None: it trains on until it is asked or killed."""

    code: int | None = ExitCode.DONE
    reason: str = ""
    saves: int = 0
    then: Callable[[], None] = nothing
    steps: tuple[float, ...] = ()


def save(run: Run, step: int) -> None:
    """A file that counts as a checkpoint where nobody reads it."""
    make_folder(run.checkpoints)
    header = json.dumps({"__metadata__": {"phase_key": json.loads(run.plan_file.read_text())["key"]}}).encode()
    (run.checkpoints / checkpoint_name(step)).write_bytes(len(header).to_bytes(8, "little") + header)


@contextmanager
def scripted_workers(script: Mapping[str, Sequence[Attempt]]) -> Iterator[list[str]]:
    """Queues get these workers: each run's attempts in turn, and done once there are no more. What happened, in order:
    "a begins", "a asked", "a killed"."""
    left = {name: list(attempts) for name, attempts in script.items()}
    calls: list[str] = []

    class Scripted:
        def __init__(self, gpus: str | None, threads: int | None) -> None:
            self.exit_code: int | None = None
            self.accepts_runs = True

        def submit(self, folder: Path, attempt: int, upcoming: Sequence[Path]) -> None:
            self.run = Run.at(folder)
            self.now = left[self.run.name].pop(0) if left.get(self.run.name) else Attempt()
            self.exit_code, self.end, self.polls = None, self.now.code, 0
            calls.append(f"{self.run.name} begins")

        def read_events(self) -> list[Any]:
            self.polls += 1
            assert self.polls < PATIENCE, f"{self.run.name} trains on, and nobody asks it to stop"
            if self.polls == 1:
                if self.now.saves:
                    save(self.run, self.now.saves)
                self.now.then()
                return [{"kind": "step", "number": n, "loss": None, "seconds": seconds, "stop": 9, "steps": 9}
                        for n, seconds in enumerate(self.now.steps, 1)]  # fmt: skip
            self.exit_code = None if self.end is None else int(self.end)
            if self.exit_code == ExitCode.DONE:
                self.run.write_state("done", step=1, exports=[])
            return (
                [{"kind": "run_ended", "reason": self.now.reason}]
                if self.exit_code is not None and self.now.reason
                else []
            )

        def request_stop(self) -> None:
            calls.append(f"{self.run.name} asked")
            if self.now.code is None and calls.count(calls[-1]) == 1:
                self.end = ExitCode.STOPPED

        def kill(self) -> None:
            calls.append(f"{self.run.name} killed")
            self.end, self.accepts_runs = -signal.SIGKILL, False

        def shutdown(self) -> None:
            self.accepts_runs = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_filling, "Worker", Scripted)
        patch.setattr(supervisor, "POLL_INTERVAL", 0.0)
        patch.setattr(supervisor, "publish", lambda *_: None)  # the page of nights without numbers
        patch.setattr(supervisor, "preload", nothing)
        yield calls
