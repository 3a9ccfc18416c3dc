"""What the crash tests of runs and processes share: quick specs, and ways to break a run at a chosen moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.house import House, Said
from tests.support.runs import export_bytes

LORA = """
[model]
base = "builtin:tiny"
max_sequence_length = 32
[data]
source = "pictures"
resolution = 64
[lora]
rank = 2
layers = ["attn.to_q"]
[train]
steps = 4
batch_size = 2
lr = 1e-3
[checkpoint]
every = 2
[track]
to = []
"""

Moment = Callable[[str, int, int, int], bool]  # run, steps done, micro-batch, pictures in it -> whether to fail


def lora(house: House, name: str = "a", **changes: str) -> Path:
    """A LoRA of one kind of layer, in a second; lines replaced as in House.spec."""
    lines = LORA.strip().splitlines()
    for key, line in changes.items():
        [at] = [i for i, old in enumerate(lines) if old.split(" =")[0] == key]
        lines[at] = line
    return house.write(f"{name}.toml", "\n".join(lines) + "\n")


@contextmanager
def failing(error: Callable[[], BaseException], when: Moment, times: int = 10**6) -> Iterator[list[int]]:
    """The objective raises `error()` where `when` says so, at most so many times; the steps where it did."""
    from runner.training.objective import FlowObjective

    loss, failed = FlowObjective.loss, list[int]()

    def failing_loss(self: Any, step: int, micro: int) -> Any:
        fits = max(1, self.context.spec.train.batch_size // self.context.micro_batch_parts)
        if len(failed) < times and when(self.context.spec.name, step, micro, fits):
            failed.append(step)
            raise error()
        return loss(self, step, micro)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowObjective, "loss", failing_loss)
        yield failed


def state(house: House, name: str = "a") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((house.folder / "runs" / name / "state.json").read_text())
    return found


def index(house: House) -> dict[str, dict[str, Any]]:
    lines = (house.folder / "runs" / "index.jsonl").read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def log(house: House, name: str = "a") -> str:
    return (house.folder / "runs" / name / "run.log").read_text()


def unbroken(house: House, *specs: Path) -> Path:
    """The same specs run undisturbed into another runs folder."""
    said = house.fluxrun("queue", *specs, "--runs", "unbroken")
    assert said.code == 0, said.err
    return house.folder / "unbroken"


def assert_same(house: House, name: str = "a", other: Path | None = None, *, suffix: str = "") -> None:
    """The run's exports have the bytes of the unbroken run's. `suffix`: of the files that must."""
    ours = export_bytes(house.folder / "runs" / name)
    theirs = export_bytes((other or house.folder / "unbroken") / name)
    names = [file for file in {**ours, **theirs} if file.endswith(suffix)]
    different = [file for file in names if ours.get(file) != theirs.get(file)]
    assert names
    assert not different, f"{name}: other bytes in {different}"


def go_on(house: House, *specs: Path | str) -> Said:
    said = house.fluxrun("queue", *specs)
    assert said.code == 0, said.err
    return said
