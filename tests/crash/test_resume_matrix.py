"""Resuming changes nothing: stopped anywhere, however often, a run ends with the bytes of an unbroken one."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.broken_runs import assert_same, failing, go_on, unbroken
from tests.support.house import House
from tests.support.runs import stopping_after

OPTIMIZERS = {"adamw": "1e-3", "adamw8bit": "1e-3", "prodigy": "1.0"}
STEPS, PIVOT, EPOCH = 6, 3, 2  # an epoch is eight pictures, two times two in a step


def pivotal(house: House, optimizer: str, workers: int = 0) -> Path:
    """Rows of CLIP and a LoRA; two micro-batches to a step; dropout in both, so that every kind of draw is there."""
    spec = house.spec(
        "a", steps=f"steps = {STEPS}", batch_size="batch_size = 2\naccumulate = 2", prompts="prompts = []",
        encoders='encoders = ["clip"]', every="every = 50", rank="rank = 32\nlayers = ['attn.to_q']\ndropout = 0.1",
        resolution=f"resolution = 64\nworkers = {workers}\ncaption_dropout = 0.2", center_crop="random_flip = true\nholdout = 2",
    )  # fmt: skip
    text = spec.read_text().replace("lr = 1e-3", f'lr = {OPTIMIZERS[optimizer]}\n[optimizer]\nname = "{optimizer}"')
    spec.write_text(text.replace("lr = 1e-2", f"lr = {'1.0' if optimizer == 'prodigy' else '1e-2'}\nuntil = 0.5"))
    return spec


@contextmanager
def cut(module: str, name: str) -> Iterator[None]:
    """Ctrl-C twice as a function of a phase returns, once."""
    from importlib import import_module

    there = import_module(module)
    made, done = getattr(there, name), list[int]()

    def cutting(*arguments: Any, **named: Any) -> Any:
        out = made(*arguments, **named)
        if not done:
            done.append(1)
            raise KeyboardInterrupt
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(there, name, cutting)
        yield


def at_micro(step: int, micro: int) -> AbstractContextManager[Any]:
    return failing(KeyboardInterrupt, lambda _, *at: at[:2] == (step, micro), times=1)


MOMENTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "after step 1": lambda: stopping_after(1),
    "in the second micro-batch of a step": lambda: at_micro(2, 1),
    "before the first step": lambda: at_micro(0, 0),
    "amid an epoch": lambda: stopping_after(EPOCH + 1),
    "at an epoch's edge": lambda: stopping_after(EPOCH),
    "at the pivot": lambda: stopping_after(PIVOT),
    "in the first step after the pivot": lambda: at_micro(PIVOT, 1),
    "in encode": lambda: cut("runner.training.run", "encode_phase"),
    "in export": lambda: cut("runner.training.phases.export", "_verified_pictures"),
    "after the export, before done": lambda: cut("runner.training.run", "export_phase"),
    "at the last step": lambda: stopping_after(STEPS),
}
FAST = [
    ("adamw", 0, ("in the second micro-batch of a step", "after step 1", "in export")),
    ("adamw", 2, ("at an epoch's edge", "at the pivot", "at the last step")),
    ("adamw8bit", 2, ("amid an epoch", "in the first step after the pivot")),
    ("prodigy", 0, ("in encode", "after step 1", "at the pivot")),
]
PRODUCT = [
    (optimizer, workers, (moment,) * times)
    for optimizer, workers, moment, times in itertools.product(OPTIMIZERS, (0, 2), MOMENTS, (1, 2))
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The runs folder of the unbroken run, one for each optimizer; `workers` is not what the bytes depend on."""
    made: dict[str, Path] = {}

    def get(optimizer: str) -> Path:
        if optimizer not in made:
            house = House(tmp_path_factory.mktemp(optimizer))
            made[optimizer] = unbroken(house, pivotal(house, optimizer))
        return made[optimizer]

    return get


def stopped_at(house: House, spec: Path, moments: tuple[str, ...]) -> None:
    for moment in moments:
        with MOMENTS[moment]():
            said = house.fluxrun("queue", spec)
        assert said.code in (0, 3), said.err  # 0 where the run had passed that moment already


def check(house: House, whole: Callable[[str], Path], optimizer: str, workers: int, moments: tuple[str, ...]) -> None:
    spec = pivotal(house, optimizer, workers)
    shutil.copytree(whole(optimizer) / "cache", house.folder / "runs" / "cache")
    stopped_at(house, spec, moments)
    go_on(house, spec)
    assert_same(house, other=whole(optimizer), suffix=".safetensors" if workers else "")  # the card tells of workers


@pytest.mark.parametrize(("optimizer", "workers", "moments"), FAST, ids=lambda value: str(value))
def test_stopped_and_resumed(
    house: House, whole: Callable[[str], Path], optimizer: str, workers: int, moments: tuple[str, ...]
) -> None:
    check(house, whole, optimizer, workers, moments)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "workers", "moments"), PRODUCT, ids=lambda value: str(value))
def test_every_moment_once_and_twice(
    house: House, whole: Callable[[str], Path], optimizer: str, workers: int, moments: tuple[str, ...]
) -> None:
    check(house, whole, optimizer, workers, moments)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopped_at_every_step_and_after_done(house: House, whole: Callable[[str], Path], optimizer: str) -> None:
    spec = pivotal(house, optimizer)
    for step in range(1, STEPS + 1):
        with stopping_after(step):
            said = house.fluxrun("queue", spec)
        assert said.code == 3, said.err
    go_on(house, spec)
    assert_same(house, other=whole(optimizer))
    assert go_on(house, spec).err == "a: skipped, done (same spec, data and base; its exports are there)\n"
    assert_same(house, other=whole(optimizer))


@pytest.mark.parametrize("forgotten", ["optimizer", "step"])
def test_control_a_resume_that_forgets_something_is_seen(
    house: House, whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """The optimizer's moments; or the step that the draws are made of, so that the same pictures come again."""
    spec = pivotal(house, "adamw")
    shutil.copytree(whole("adamw") / "cache", house.folder / "runs" / "cache")
    stopped_at(house, spec, ("after step 1",))
    if forgotten == "optimizer":
        from runner.training.optimizers import Optimizer

        monkeypatch.setattr(Optimizer, "restore", lambda *_: None)
    else:
        from runner.training.objective import FlowObjective

        loss = FlowObjective.loss
        monkeypatch.setattr(FlowObjective, "loss", lambda self, step, micro: loss(self, step - 1, micro))
    go_on(house, spec)
    with pytest.raises(AssertionError, match="other bytes in .*pytorch_lora_weights"):
        assert_same(house, other=whole("adamw"))
