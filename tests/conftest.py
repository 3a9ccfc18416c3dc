"""Tests are sessions at the command line, on the bundled base, in this process; only signals and kills need another one."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from runner.engine import supervisor

if TYPE_CHECKING:
    from runner.training.context import RunContext

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tiny base gains nothing from a second thread; the workers need it
os.environ.pop("COLUMNS", None)  # tables are as wide as a pipe has them, where a test does not say
os.environ["SOURCE_DATE_EPOCH"] = "1769860800"  # 2026-01-31: runs that are compared may begin on two days
PROJECT = Path(__file__).parent.parent
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fluxrun-tests-")  # what a machine remembers is not for tests
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

PICTURES = PROJECT / "specs" / "quickstart"
PIVOTAL = """
[model]
base = "builtin:tiny"
max_sequence_length = 32
[data]
source = "pictures"
resolution = 64
center_crop = true
[[tokens]]
name = "TOK"
[inversion]
encoders = ["clip", "t5"]
lr = 1e-2
[lora]
rank = 4
[train]
steps = 6
batch_size = 2
lr = 1e-3
[checkpoint]
every = 2
[validate]
prompts = ["a TOK on a white background"]
steps = 2
"""


@cache
def _keep_libraries() -> None:
    """Take the libraries' half a million objects, all there after the first command, out of the garbage collector's way:
    a run collects seven times, and each pass over them takes longer than its training here."""
    gc.freeze()


@dataclass
class Said:
    code: int
    out: str
    err: str


class Inline:
    """A queue's trainer without a process of its own: the same code here, which spares every test the start of one."""

    def __init__(self, gpus: str | None, threads: int | None) -> None:
        self.gpus = gpus
        self.warm: Any = None  # which imports torch

    def order(self, folder: Path, attempt: int, later: Sequence[Path]) -> None:
        self.code: int | None = None
        self.told = folder, attempt, tuple(later)

    def poll(self) -> list[Any]:
        from runner.core.signals import StopRequest
        from runner.engine.worker_main import TrainRequest, WorkerState, train_run

        self.warm = self.warm or WorkerState()
        events: list[Any] = []
        with StopRequest() as stop:
            self.code = train_run(TrainRequest(*self.told), self.gpus, events.append, stop, self.warm)
        return events

    lives = True

    def dismiss(self) -> None:
        """Nothing to end."""


supervisor.Worker = Inline  # type: ignore[assignment, misc]


class House:
    """A folder with eight pictures, where specs are written and fluxrun is typed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(PICTURES, folder / "pictures")

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def spec(self, name: str = "a", /, *, drop: str = "", **changes: str) -> Path:
        """PIVOTAL with whole lines replaced: spec(steps="steps = 4"); `drop` names a table to leave out."""
        lines = PIVOTAL.strip().splitlines()
        if drop:
            start = lines.index(drop)
            stop = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("[")), len(lines))
            del lines[start:stop]
        for key, line in changes.items():
            at = [i for i, old in enumerate(lines) if old.split(" =")[0] == key]
            assert at, f"no line {key} in the spec"
            lines[at[0]] = line
        return self.write(f"{name}.toml", "\n".join(lines) + "\n")

    def fluxrun(self, *arguments: str | Path) -> Said:
        from runner.cli import main

        before = Path.cwd()
        os.chdir(self.folder)
        try:
            result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        finally:
            os.chdir(before)
            if "peft" in sys.modules:  # a command that trains; the light ones import none of them
                _keep_libraries()
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Said(result.exit_code, result.stdout, result.stderr)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """The same in a process of its own, for signals."""
        command = [sys.executable, "-P", "-m", "runner", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )


def desk_of(spec: Path) -> RunContext:
    """What `fluxrun queue` would set up for this one spec, before the first phase."""
    import torch

    from runner.cache.store import Cache
    from runner.core.events import EventLog
    from runner.jobs.prepare import prepare_jobs
    from runner.model import device
    from runner.model.flux1 import loading
    from runner.training.context import RunContext
    from runner.training.distributed import Ranks

    loading.quiet()
    [job] = prepare_jobs([spec], spec.parent / "runs", fetch=True, fresh=False)
    cpu, model = torch.device("cpu"), job.spec.model
    cache, dtype = Cache(spec.parent / "runs" / "cache"), device.resolve_dtype(model.dtype, cpu)
    base = loading.open_base(
        model.base, model.revision, model.variant, cpu, dtype, model.quantize, cache.folder, model.offload == "blocks"
    )
    assert job.pictures is not None
    (spec.parent / "runs").mkdir(exist_ok=True)  # as the queue does
    return RunContext(job.spec, job.plan, job.pictures, base, cache, EventLog(), Ranks(), lambda: False)


@pytest.fixture(autouse=True)
def _new_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has never trained: no test knows what another one took."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> House:
    """One finished pivotal run, `a`, that many tests look at; none changes it."""
    house = House(tmp_path_factory.mktemp("done"))
    said = house.fluxrun("queue", house.spec("a"))
    assert said.code == 0, said.err
    return house


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
    report, asked = recorder.RunRecorder.step, signals.StopRequest.__call__

    def reporting(self: Any, one: Any) -> None:
        reached.append(one.number)
        report(self, one)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder.RunRecorder, "step", reporting)
        patch.setattr(signals.StopRequest, "__call__", lambda self: asked(self) or step in reached)
        yield
