"""What the benchmarks share: the spec they train, a run in this process that stops for another's turn, how figures are
told.

The one place that knows fluxrun from inside: it writes spec files, has them planned, and trains with the function that
the trainer process calls (`runner.engine.worker_main.train_run`), with everything around a step that a night has around
it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from make_model import make

from runner.runs.claim import claim_run

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "runner" / "bases" / "tiny"
PICTURES = ROOT / "specs" / "quickstart"


@dataclass(frozen=True)
class Size:
    """At which a base is timed; steps: of a turn."""

    resolution: int
    tokens: int
    batch: int
    rank: int
    steps: int


SIZES = {"tiny": Size(64, 32, 4, 16, 20), "model": Size(256, 128, 1, 8, 4)}


@dataclass(frozen=True)
class Asked:
    """A spec of the benchmarks. encoders: which learn rows, until this part of the steps. prompt: None where every
    picture has its caption."""

    base: Path
    pictures: Path
    resolution: int = 256
    tokens: int = 128
    batch: int = 1
    rank: int = 8
    optimizer: str = "prodigy"
    encoders: tuple[str, ...] = ()
    until: float = 0.5
    steps: int = 40
    seed: int = 0
    prompt: str | None = "a photo of TOK"
    save_every: int = 100
    loss: bool = False  # the reference takes none
    checkpointing: str = "false"  # while rows learn, as TOML has it

    @property
    def text(self) -> str:
        lr = 1.0 if self.optimizer == "prodigy" else 1e-4
        named = "".join(f'"{name}", ' for name in self.encoders)
        learned = f"""
[[tokens]]
name = "TOK"
[inversion]
encoders = [{named}]
until = {self.until}
lr = {lr}
gradient_checkpointing = {self.checkpointing}
"""
        return f"""
seed = {self.seed}
[model]
base = "{self.base}"
max_sequence_length = {self.tokens}
[data]
source = "{self.pictures}"
{"" if self.prompt is None else f'prompt = "{self.prompt}"'}
resolution = {self.resolution}
center_crop = true
{learned if self.encoders else ""}
[lora]
rank = {self.rank}
layers = "attention+mlp"  # as the reference has it
[train]
steps = {self.steps}
batch_size = {self.batch}
lr = {lr}
[optimizer]
name = "{self.optimizer}"
[checkpoint]
every = {self.save_every}
[validate]
loss = {str(self.loss).lower()}
"""


class Clock:
    """What it was when this began; the process's CPU time counts all of its threads."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def since(self, steps: int) -> tuple[float, float]:
        return (time.perf_counter() - self.wall) / steps, (time.process_time() - self.cpu) / steps


@dataclass
class Turns:
    """Seconds of a step, turn by turn, each as (wall, CPU); trained: numbers that learn."""

    ours: list[tuple[float, float]] = field(default_factory=list)
    other: list[tuple[float, float]] = field(default_factory=list)
    trained: int = 0

    def ratios(self, kind: int) -> list[float]:
        """Turn by turn; kind 0 of wall seconds, 1 of CPU seconds, in which a neighbour's load shows less."""
        return [ours[kind] / other[kind] for ours, other in zip(self.ours, self.other, strict=True)]


def train_here(asked: Asked, folder: Path, heard: Callable[[int], bool]) -> Path:
    """Train as a trainer process does, but in this one. `heard(step)` is called at the end of every step, and stops the
    run by True. The folder of the run."""
    from runner.core.errors import ExitCode
    from runner.engine.worker_main import TrainRequest, WorkerState, train_run
    from runner.jobs.prepare import prepare_jobs
    from runner.model import libraries

    file = folder / "bench.toml"
    file.write_text(asked.text)
    [job] = prepare_jobs([file], folder / "runs", fetch=False, fresh=False)
    attempt = claim_run(job.run, job.spec, job.plan, "bench")
    libraries.preload_libraries()
    enough, ended = False, ""

    def send(event: Any) -> None:
        nonlocal enough, ended
        if event["kind"] == "run_ended":
            ended = event["reason"]
        if event["kind"] == "step" and not enough:
            enough = heard(event["number"])

    code = train_run(TrainRequest(job.run.folder, attempt), "cpu", send, lambda: enough, WorkerState())  # type: ignore[arg-type]
    if not enough:
        raise SystemExit(f"the run ended too early, with {ExitCode(code).name}: {ended}")
    job.run.release()
    return job.run.folder


def take_turns(asked: Asked, folder: Path, steps: int, rounds: int, other: Callable[[int], None]) -> Turns:
    """A run, and `other(steps)` after every `steps` steps of it; a warm-up, then `rounds` rounds. A turn of ours is all
    that passes between two of the other's; loading comes before the warm-up."""
    turns, began = Turns(), Clock()

    def heard(step: int) -> bool:
        nonlocal began
        if step % steps == 0:
            turns.ours.append(began.since(steps))
            began = Clock()
            with as_torch_comes():
                other(steps)
            turns.other.append(began.since(steps))
            began = Clock()
        return len(turns.ours) > rounds

    turns.trained = trained_numbers(newest_checkpoint(train_here(asked, folder, heard)))
    del turns.ours[0], turns.other[0]
    return turns


def steps_of(run: Path) -> int:
    """The last step that the run of this folder has written down, 0 before the first."""
    from runner.tracking.history import read_history

    return max(read_history(run / "history.jsonl").get("train/loss", {0: 0.0}))


def state_of(run: Path) -> dict[str, Any]:
    from runner.core.files import read_json

    return read_json(run / "state.json")


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def write_in_the_foreground(file: Path) -> float:
    """Seconds that writing the same checkpoint again takes."""
    from runner.checkpoint import storage

    made = storage.read(file)
    began = time.perf_counter()
    storage.write(file.with_name("again"), made)
    return time.perf_counter() - began


def trained_numbers(file: Path) -> int:
    """How many numbers of a checkpoint are the run's own, without the optimizer's."""
    from runner.checkpoint import storage

    weights = storage.read(file).weights
    return sum(tensor.numel() for kind in (weights.lora, weights.rows) for tensor in kind.values())


@contextmanager
def as_torch_comes() -> Iterator[None]:
    """The other side's turn: repeatable kernels, which a run asks for, are not what a bare loop has."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def pictures_in(folder: Path, *, captions: bool = False) -> Path:
    """The quickstart's pictures in a folder of their own, with or without their captions."""
    folder.mkdir(parents=True)
    for file in sorted(PICTURES.iterdir()):
        if file.suffix == ".png" or captions:
            shutil.copy(file, folder)
    return folder


def model_in(given: Path | None, folder: Path) -> Path:
    """The model that was given; else one is made."""
    if given is None:
        make(folder / "model")
        return folder / "model"
    return given.resolve()


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="what make_model.py wrote; default: it is made for the occasion")
    return parser


def machine() -> str:
    """One line: what the figures below it were measured on."""
    from importlib.metadata import version

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    return (
        f"{cpu}, {os.cpu_count()} cores, torch with {torch.get_num_threads()} threads; python {platform.python_version()}, "
        f"{libraries}; load {os.getloadavg()[0]:.1f}"
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and in brackets the least and the most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(rows: Sequence[Sequence[str]]) -> None:
    """Print them as Markdown; the first is the heading."""
    heading, *rest = rows
    for row in (heading, ["---"] * len(heading), *rest):
        print(f"| {' | '.join(row)} |", flush=True)
