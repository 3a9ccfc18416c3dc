"""Clocks lie: file times reversed, the wall clock a day back, in 1970 or ten years on, in the middle of a run.

What is newest is told by steps alone, what is due by the monotonic clock, and no duration is ever negative.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from runner.runs.checkpoint_files import checkpoint_name, checkpoint_steps
from runner.training import loop
from runner.training.distributed import Ranks
from runner.training.loop import LoopConfig, TrainState
from runner.training.optimizers import AdamWParams, Optimizer, ParameterGroup
from tests.support.checkpoints import STEPS, made, new_run, newest, writer
from tests.support.house import House
from tests.support.runs import export_bytes
from tests.support.step_loop import Recorded, constant

DAY, YEAR = 86_400.0, 31_556_952.0


@pytest.mark.parametrize("jump", ["reversed", "all alike", "1970", "in ten years"])
def test_the_newest_is_the_highest_step_whatever_the_files_times(jump: str) -> None:
    run, now = new_run(), time.time()
    saving = writer(run, keep=9)
    for number, step in enumerate(STEPS):
        saving.write(made(step))
        at = {"reversed": now - number * 60, "all alike": now, "1970": 0.0, "in ten years": now + 10 * YEAR - number}[
            jump
        ]
        os.utime(run.checkpoints / checkpoint_name(step), (at, at))
    found = newest(run)
    assert found is not None
    assert found.step == STEPS[-1]
    old = by_time(run.checkpoints)
    print(f"clock, {jump}: {found.step}; control by file times: {old}")
    if jump in ("reversed", "in ten years"):  # the negative control
        assert old != STEPS[-1]
    writer(run, keep=1).write(made(60))  # prunes by steps, too
    assert [step for step, _ in checkpoint_steps(run.checkpoints)] == [60, 20]


def by_time(folder: os.PathLike[str]) -> int:
    """What a loader finds that believes file times."""
    newest_file = max(os.scandir(folder), key=lambda entry: entry.stat().st_mtime)
    return int(newest_file.name.removeprefix("step-").split(".")[0])


class Weight:
    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(()))

    def loss(self, step: int, micro: int) -> Tensor:
        return self.weight.square()

    def post_step(self) -> None:
        pass


def saved_at(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of eight at which a checkpoint is due, at least every minute."""
    monkeypatch.setattr(loop, "time", clock)
    learner = Weight()
    optimizer = Optimizer([ParameterGroup({"lora/w": learner.weight}, 0.1, 0.0)], AdamWParams(0.9, 0.999, 1e-8))
    config, recorded = LoopConfig(0, 8, 8, 1, 1.0, 100, 60.0, None), Recorded()
    loop.train(learner, optimizer, constant, config, TrainState(), Ranks(), recorded)
    return [step for step, _ in recorded.saved]


def test_checkpoint_minutes_are_those_of_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    wild = itertools.cycle([0.0, DAY, 10 * YEAR, -DAY])
    jumping, standing = (lambda: next(wild)), (lambda: 0.0)
    still = SimpleNamespace(time=jumping, monotonic=lambda: 7.0, perf_counter=standing)
    assert saved_at(still, monkeypatch) == [8]  # only the wall clock jumps: nothing is due before the end
    ticks = itertools.count(step=61)
    moving = SimpleNamespace(time=standing, monotonic=lambda: float(next(ticks)), perf_counter=standing)
    assert saved_at(moving, monkeypatch) == [1, 2, 3, 4, 5, 6, 7, 8]  # the wall clock stands still: each one is due


def test_a_run_whose_clock_jumps(house: House, done: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day back, into 1970 and ten years on, over and over, while a run stops on a signal's like and resumes: the same
    bytes in the end, and every duration makes sense."""
    real, jumps = time.time, itertools.cycle([0.0, -DAY, 10 * YEAR, None])

    def clock() -> float:
        jump = next(jumps)
        return 1.0 if jump is None else real() + jump

    spec = house.spec("a")
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr("runner.checkpoint.writer.SPARE", 1 << 60)  # no room for the first checkpoint: the run pauses
    assert house.fluxrun("queue", spec).code == 3
    monkeypatch.setattr("runner.checkpoint.writer.SPARE", 0)
    began = time.monotonic()
    said = house.fluxrun("queue", spec)
    lasted = time.monotonic() - began
    assert said.code == 0, said.err
    run = house.folder / "runs" / "a"
    state = json.loads((run / "state.json").read_text())
    assert 0 < state["s_per_step"] < state["wall_s"]
    assert state["wall_s"] < 3 * lasted + 60
    [row] = json.loads(house.fluxrun("status", "--json").out)
    assert row["state"] == "done"
    assert house.fluxrun("results").code == 0
    assert export_bytes(run) == export_bytes(done.folder / "runs" / "a")
