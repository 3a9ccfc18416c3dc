"""TensorBoard after a resume: each step once, in one line, whatever the attempts before had logged and the clock
said."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.broken_runs import failing, go_on, lora
from tests.support.house import House
from tests.support.runs import stopping_after

STEPS = 4


def logged(run: Path) -> list[int]:
    """The steps of the training loss as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run), size_guidance={"scalars": 0})
    shown.Reload()
    return [event.step for event in shown.Scalars("train/loss")]


def values(run: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run), size_guidance={"scalars": 0})
    shown.Reload()
    return [event.value for event in shown.Scalars("train/loss")]


def written(run: Path) -> list[int]:
    """All that was ever logged, in the order of the files' names."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [
        event.step
        for path in sorted(run.glob("events*"))
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "train/loss"
    ]


@contextmanager
def clock(shift: float) -> Iterator[None]:
    real = time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + shift)
        yield


@pytest.fixture
def run(house: House) -> Path:
    lora(house, to='to = ["tensorboard"]', every="every = 50")
    return house.folder / "runs" / "a"


def test_stopped_and_gone_on(house: House, run: Path) -> None:
    for step in (1, 2):
        with stopping_after(step):
            assert house.fluxrun("queue", "a.toml").code == 3
    go_on(house, "a.toml")
    assert logged(run) == [1, 2, 3, 4]
    assert written(run) == [1, 2, 3, 4]


@pytest.mark.parametrize("shift", [0.0, -86_400.0, 10 * 365 * 86_400.0], ids=["clock", "back a day", "ten years on"])
def test_steps_beyond_the_last_checkpoint_are_shown_once(house: House, run: Path, shift: float) -> None:
    """Logged by an attempt that was lost after step 3, and again by the next one, whose clock went wrong."""
    with stopping_after(1):
        assert house.fluxrun("queue", "a.toml").code == 3
    with failing(lambda: KeyboardInterrupt(), lambda _, step, *__: step == 3, times=1):
        assert house.fluxrun("queue", "a.toml").code == 3
    with clock(shift):
        go_on(house, "a.toml")
    assert sorted(written(run)) == [1, 2, 2, 3, 3, 4]
    assert logged(run) == [1, 2, 3, 4]
    assert len(set(values(run))) == STEPS


def test_control_without_a_purge_steps_are_shown_twice(
    house: House, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import tensorboard

    made = tensorboard.SummaryWriter.__init__
    monkeypatch.setattr(
        tensorboard.SummaryWriter, "__init__", lambda self, *a, purge_step=None, **k: made(self, *a, **k)
    )
    with stopping_after(1):
        assert house.fluxrun("queue", "a.toml").code == 3
    with failing(lambda: KeyboardInterrupt(), lambda _, step, *__: step == 3, times=1):
        assert house.fluxrun("queue", "a.toml").code == 3
    go_on(house, "a.toml")
    assert logged(run) == [1, 2, 3, 2, 3, 4]
