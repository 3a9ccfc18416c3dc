"""Everything that ends training before its last step: deadline, signals, and the rules that go by the eval loss."""

from __future__ import annotations

import datetime
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runner.core import signals
from runner.core.errors import InterruptedRunError
from runner.core.signals import StopRequest, next_time
from runner.training.distributed import Ranks
from runner.training.loop import (
    CURVE_POINTS,
    SMOOTHING,
    EarlyStopping,
    LoopConfig,
    TrainState,
    after_validation,
    train,
)
from tests.support.house import House
from tests.support.scripted_workers import Attempt, scripted_workers
from tests.support.step_loop import Line, Recorded, adam, constant

# ---- --stop-at -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the clock on the wall shows, for deadlines."""
    shown = SimpleNamespace(now=datetime.datetime(2026, 7, 1, 6, 59, 30))
    fake = SimpleNamespace(
        datetime=SimpleNamespace(now=lambda: shown.now), time=datetime.time, timedelta=datetime.timedelta
    )
    monkeypatch.setattr(signals, "datetime", fake)
    return shown


def test_at_the_deadline_a_run_is_asked_to_stop_and_no_other_begins(house: House, clock: SimpleNamespace) -> None:
    """Once, and no more: it saves and stops. The same command goes on the next evening."""

    def until_seven() -> None:
        clock.now = datetime.datetime(2026, 7, 1, 7, 0, 0)

    specs = [house.spec(name) for name in "ab"]
    command: tuple[str | Path, ...] = ("queue", *specs, "--stop-at", "07:00", "--gpus", "cpu", "--no-check")
    with scripted_workers({"a": [Attempt(None, then=until_seven)]}) as calls:
        said = house.fluxrun(*command)
    assert (said.code, calls) == (3, ["a begins", "a asked"])
    states = {row["name"]: row["state"] for row in json.loads(house.fluxrun("status", "--json").out)}
    assert states == {"a": "stopped", "b": "stopped"}
    with scripted_workers(
        {"a": [Attempt(None, then=lambda: setattr(clock, "now", clock.now + datetime.timedelta(days=1)))]}
    ) as calls:
        assert house.fluxrun(*command).code == 3  # it is seven o'clock: the next one is meant
    assert calls == ["a begins", "a asked"]
    clock.now = datetime.datetime(2026, 7, 2, 22, 0, 0)
    with scripted_workers({}) as calls:
        assert house.fluxrun(*command).code == 0
    assert calls == ["a begins", "b begins"]


@pytest.mark.parametrize(
    ("now", "text", "wanted"),
    [
        ("2026-07-01 06:59:59", "07:00", "2026-07-01 07:00:00"),
        ("2026-07-01 07:00:00", "07:00", "2026-07-02 07:00:00"),
        ("2026-07-01 22:13:05", "07:30", "2026-07-02 07:30:00"),
        ("2026-12-31 23:59:59", "00:00", "2027-01-01 00:00:00"),
    ],
)
def test_a_deadline_is_the_next_time_the_clock_shows_it(
    clock: SimpleNamespace, now: str, text: str, wanted: str
) -> None:
    clock.now = datetime.datetime.fromisoformat(now)
    assert next_time(text) == datetime.datetime.fromisoformat(wanted)


def test_a_deadline_counts_as_one_signal(clock: SimpleNamespace) -> None:
    """Not as one more: the second signal, not the first after the deadline, stops at once."""
    request = StopRequest(clock.now + datetime.timedelta(seconds=30))
    assert (request(), request.requests) == (False, 0)
    clock.now += datetime.timedelta(seconds=30)
    assert (request(), request.requests) == (True, 1)
    request.signals = 1
    assert request.requests == 1
    request.signals = 2
    assert request.requests == 2


# ---- signals -------------------------------------------------------------------------------------------------------

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def _unheard() -> Any:
    """A signal that reaches nobody fails the test, rather than ending this process."""

    def unheard(number: int, _: object) -> None:
        raise AssertionError(f"{signal.Signals(number).name} reached nobody")

    before = {number: signal.signal(number, unheard) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_unheard")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_the_second_one_stops_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert not request()
        os.kill(os.getpid(), number)
        assert request()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(number) is before
    with StopRequest(interrupt_on_second=False) as request:
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert request.requests == 3


@pytest.mark.usefixtures("_unheard")
def test_a_hangup_is_no_request_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not request()
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT))
        os.kill(os.getpid(), signal.SIGINT)
        assert request()


def loop(line: Line, steps: int, **more: Any) -> list[tuple[int, TrainState]]:
    """Train; what was saved. more: `config` (fields of LoopConfig), `eval_loss`, `stop_requested`."""
    numbers = {"save_every": 100, "validate_every": None, "early": EarlyStopping(), **more.pop("config", {})}
    config = LoopConfig(0, steps, steps, 1, 1e9, save_seconds=None, **numbers)
    recorded = Recorded(more.pop("eval_loss", lambda _: None), more.pop("stop_requested", lambda: False))
    try:
        train(line, adam(line), constant, config, TrainState(), Ranks(), recorded)
    except InterruptedRunError as error:
        recorded.saved.append((-1, TrainState(ended=str(error))))
    return recorded.saved


def test_a_request_is_answered_after_the_step_with_a_save() -> None:
    asked = iter([False, False, True])
    saved = loop(Line(), 9, stop_requested=lambda: next(asked))
    assert [step for step, _ in saved] == [3, -1]
    assert saved[-1][1].ended == "stopped after step 3; the same command goes on from there"


@pytest.mark.parametrize(
    ("every", "steps", "wanted"), [(3, 9, [3, 6, 9]), (4, 9, [4, 8, 9]), (1, 3, [1, 2, 3]), (10, 9, [9])]
)
def test_a_checkpoint_is_due_every_so_many_steps_and_at_the_end(every: int, steps: int, wanted: list[int]) -> None:
    assert [step for step, _ in loop(Line(), steps, config={"save_every": every})] == wanted


# ---- by the eval loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("early", "loss", "best", "best_step", "step", "told"),
    [
        (EarlyStopping(at=0.5), 0.5, 0.5, 10, 10, "eval loss 0.50000 at step 10 has come down to stop.at (0.5)"),
        (EarlyStopping(at=0.5), 0.5001, 0.5001, 10, 10, ""),
        (EarlyStopping(loss_above=2.0), 2.0, 1.0, 5, 10, ""),
        (EarlyStopping(loss_above=2.0), 2.0001, 1.0, 5, 10, "eval loss 2.00010 at step 10 is above stop.loss_above (2)"),
        (EarlyStopping(no_better_for=5), 1.5, 1.0, 5, 9, ""),
        (
            EarlyStopping(no_better_for=5), 1.5, 1.0, 5, 10,
            "no eval loss below 1.00000 of step 5 for 5 steps (stop.no_better_for)",
        ),
        (EarlyStopping(no_better_for=5), 1.0, 1.0, 10, 10, ""),
        (EarlyStopping(at=0.5, loss_above=2.0, no_better_for=5), 1.0, 1.0, 8, 10, ""),
        (EarlyStopping(), 9.0, 1.0, 1, 100, ""),
    ],
)  # fmt: skip
def test_the_edges_of_every_rule(
    early: EarlyStopping, loss: float, best: float, best_step: int, step: int, told: str
) -> None:
    assert early.reason(TrainState(eval_loss=loss, best=best, best_step=best_step), step) == told
    assert early.reason(TrainState(), step) == ""  # nothing was validated yet


def test_the_best_step_is_the_first_with_the_lowest_loss() -> None:
    """A loss that is no number is told, and is not the best."""
    state, seen = TrainState(), []
    for step, loss in enumerate([float("nan"), 3.0, 2.0, 2.0, float("nan"), 2.5, 1.0], 1):
        state = after_validation(state, step, loss)
        seen.append(state.best_step)
    assert seen == [None, 2, 3, 3, 3, 3, 7]
    assert (state.best, state.eval_loss) == (1.0, 1.0)
    assert after_validation(state, 8, None) == state


def test_the_last_step_is_no_early_end() -> None:
    saved = loop(Line(), 4, config={"validate_every": 2, "early": EarlyStopping(at=9.0)}, eval_loss=lambda _: 1.0)
    assert [(step, bool(state.ended)) for step, state in saved] == [(2, True)]
    saved = loop(Line(), 2, config={"validate_every": 2, "early": EarlyStopping(at=9.0)}, eval_loss=lambda _: 1.0)
    assert [(step, bool(state.ended)) for step, state in saved] == [(2, False)]


def test_looks_come_every_so_many_steps_and_at_the_end() -> None:
    looks: list[int] = []
    loop(Line(), 7, config={"validate_every": 3}, eval_loss=lambda step: looks.append(step))
    assert looks == [3, 6, 7]


BEST = """
[model]
base = "builtin:tiny"
max_sequence_length = 16
[data]
source = "pictures"
resolution = 64
[lora]
rank = 2
layers = ["attn.to_q"]
[train]
steps = 5
[checkpoint]
every = 1
keep = 1
[validate]
every = 1
[export]
best = true
dtype = "fp32"
[track]
to = []
"""


def test_the_best_step_outlives_the_newest_ones(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """checkpoint.keep = 1, the best eval loss at step 1 and the export of the best: its checkpoint is still there, and
    the exports are its own."""
    from safetensors.torch import load_file

    from runner.checkpoint import storage
    from runner.training import objective

    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(objective.FlowObjective, "evaluate", lambda self: {0.5: next(losses)})
    spec = house.write("a.toml", BEST)
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    run = house.folder / "runs" / "a"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000001.safetensors",  # the best
        "step-000004.safetensors",  # the newest one beside the end of a phase
        "step-000005.safetensors",
    ]
    assert "a: export: step 1, whose eval loss is the lowest\n" in said.err
    trained = storage.read(run / "checkpoints" / "step-000001.safetensors").weights.lora
    exported = load_file(run / "export" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(exported[f"transformer.{name}"], value) for name, value in trained.items())


# ---- what a run tells of its loss ----------------------------------------------------------------------------------


def reported(line: Line, steps: int) -> Recorded:
    recorded = Recorded()
    train(
        line, adam(line), constant, LoopConfig(0, steps, steps, 1, 1e9, 2, None, None), TrainState(), Ranks(), recorded
    )
    return recorded


def test_the_smoothed_loss_is_mostly_what_it_was() -> None:
    """The first loss as it is, then 98 parts of what it was and 2 of the new one; a step without a number changes
    nothing."""
    assert SMOOTHING == 0.98
    recorded = reported(Line(bad=(2,)), 6)
    expected = recorded.steps[0].loss
    for step, state in zip(recorded.steps, recorded.states, strict=True):
        if step.number not in (1, 3):
            expected = 0.98 * expected + 0.02 * step.loss
        assert state.smoothed == pytest.approx(expected, rel=1e-6)
    assert expected > recorded.steps[-1].loss + 1  # the loss has come down by more than that


def test_the_curve_holds_the_smoothed_loss_of_every_step() -> None:
    assert CURVE_POINTS > 6
    recorded = reported(Line(), 6)
    smoothed = [state.smoothed for state in recorded.states]
    assert recorded.saved[-1][1].curve == [[number, loss] for number, loss in enumerate(smoothed, 1)]
