"""The step loop by itself: what is skipped, clipped, scaled and carried over a checkpoint."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from runner.core.errors import NonFiniteError
from runner.training.distributed import Ranks
from runner.training.loop import BAD_STEPS, EarlyStopping, LoopConfig, TrainState, train
from runner.training.optimizers import AdamW8bitParams, AdamWParams, Optimizer, ParameterGroup
from runner.training.prefetch import Prefetcher
from tests.support.step_loop import Line, Recorded, adam, constant, run


def test_a_step_without_a_number_is_skipped_and_counted() -> None:
    line = Line(bad=(3,))
    steps, saved = run(line)
    assert [step.number for step in steps if step.skipped] == [4]
    assert line.post_steps == 7
    assert all(torch.isfinite(weight).all() for *_, weight in saved)
    assert saved[-1][1].skipped == 1
    assert saved[-1][1].in_row == 0
    assert math.isfinite(saved[-1][1].smoothed or math.nan)


def test_five_in_a_row_end_the_run_with_the_weights_as_they_were() -> None:
    line = Line(bad=tuple(range(3, 99)))
    with pytest.raises(NonFiniteError, match=f"step 8: no finite loss or gradient in {BAD_STEPS} steps in a row"):
        run(line, 50)
    unharmed = Line()
    run(unharmed, 3)
    assert torch.equal(line.weight, unharmed.weight)


def test_the_count_of_bad_steps_crosses_a_checkpoint() -> None:
    line = Line(bad=tuple(range(99)))
    with pytest.raises(NonFiniteError, match="step 7"):
        run(line, 50, start=5, state=TrainState(skipped=3, in_row=3))


def test_gradients_are_clipped_over_what_is_trained() -> None:
    free, clipped = Line(), Line()
    assert run(free, 1)[0][0].grad_norm == pytest.approx(10.0)
    optimizer = Optimizer([ParameterGroup({"lora/w": clipped.weight}, 0.1, 0.0)], AdamWParams(0.0, 0.0, 1.0))
    seen: list[Tensor] = []
    real = optimizer.step

    def step(factor: float) -> None:
        assert clipped.weight.grad is not None
        seen.append(clipped.weight.grad.clone())
        real(factor)

    optimizer.step = step  # type: ignore[method-assign]
    config = LoopConfig(0, 1, 1, 1, 0.5, 2, None, None)
    train(clipped, optimizer, constant, config, TrainState(), Ranks(), Recorded())
    assert float(seen[0].norm()) == pytest.approx(0.5, rel=1e-4)


def test_a_scaler_finds_its_scale_without_being_taken_for_a_failure() -> None:
    line = Line(huge=64.0)
    steps, saved = run(line, 40, fp16=True)
    assert sum(step.skipped for step in steps) > BAD_STEPS
    assert not steps[-1].skipped
    scale = saved[-1][1].scaler["scale"]
    assert 1 <= scale < 65536
    assert saved[-1][1].scaler["_growth_tracker"] > 0
    resumed = Line(huge=64.0)
    steps, _ = run(resumed, 42, start=40, state=saved[-1][1], fp16=True)
    assert not any(step.skipped for step in steps)


def test_accumulation_is_the_mean() -> None:
    """Two half losses give the gradient of one whole."""
    line = Line()
    recorded = Recorded()
    config = LoopConfig(0, 3, 3, 4, 1e9, 2, None, None)
    train(line, adam(line), constant, config, TrainState(), Ranks(), recorded)
    steps = recorded.steps
    wanted, _ = run(Line(), 3)
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in wanted])
    assert [step.grad_norm for step in steps] == pytest.approx([step.grad_norm for step in wanted])


def test_eight_bits_follow_thirty_two_closely_and_resume_exactly() -> None:
    def built(numbers: AdamWParams | AdamW8bitParams) -> tuple[nn.Parameter, Optimizer]:
        weight = nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
        return weight, Optimizer([ParameterGroup({"lora/w": weight}, 1e-2, 0.01)], numbers)

    def advance(weight: nn.Parameter, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step(1.0)

    full, optimizer = built(AdamWParams(0.9, 0.99, 1e-8))
    start = full.detach().clone()
    advance(full, optimizer, range(20))
    small, optimizer = built(AdamW8bitParams(0.9, 0.99, 1e-8))
    advance(small, optimizer, range(12))
    tensors, numbers = optimizer.state()
    assert tensors["lora/w/state1"].dtype == torch.uint8
    weight, again = built(AdamW8bitParams(0.9, 0.99, 1e-8))
    weight.data.copy_(small.data)
    again.restore(tensors, numbers)
    advance(small, optimizer, range(12, 20))
    advance(weight, again, range(12, 20))
    assert torch.equal(weight, small)
    moved = (full - start).norm()
    assert float((small - full).detach().norm() / moved.detach()) < 0.1


def test_a_checkpoint_is_also_due_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves five seconds each time it is read; a checkpoint is due every twelve."""
    import itertools
    import time

    ticks = itertools.count(step=5)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    line = Line()
    recorded = Recorded()
    config = LoopConfig(0, 8, 8, 1, 1.0, 100, 12.0, None)
    train(line, adam(line), constant, config, TrainState(), Ranks(), recorded)
    assert [step for step, _ in recorded.saved] == [
        3,
        6,
        8,
    ]  # at 15 and 35 s (a save reads the clock once more), and at the end


@pytest.mark.parametrize(
    ("early", "losses", "last", "why"),
    [
        (
            EarlyStopping(no_better_for=4),
            [5, 4, 3, 3.5, 3.2, 2],
            10,
            "no eval loss below 3.00000 of step 6 for 4 steps",
        ),
        (
            EarlyStopping(loss_above=4.5),
            [4, 4.2, 4.6, 1],
            6,
            "eval loss 4.60000 at step 6 is above stop.loss_above (4.5)",
        ),
        (EarlyStopping(at=2.5), [5, 3, 2.5, 1], 6, "eval loss 2.50000 at step 6 has come down to stop.at (2.5)"),
        (EarlyStopping(), [5, 6, 7, 8, 9, 10], 12, ""),
    ],
)
def test_training_ends_early_by_rule(early: EarlyStopping, losses: list[float], last: int, why: str) -> None:
    """Validation every two steps."""
    line = Line()
    recorded = Recorded(lambda step: losses[step // 2 - 1])
    config = LoopConfig(0, 12, 12, 1, 1.0, 100, None, 2, early)
    train(line, adam(line), constant, config, TrainState(), Ranks(), recorded)
    saved = recorded.saved
    assert [step for step, _ in saved] == [last]
    assert saved[-1][1].ended.startswith(why)
    assert bool(saved[-1][1].ended) == bool(why)


def test_the_best_step_is_saved_when_it_is_found() -> None:
    line = Line()
    losses = [5.0, 3.0, 4.0, 2.0, 6.0]
    recorded = Recorded(lambda step: losses[step // 2 - 1])
    config = LoopConfig(0, 10, 10, 1, 1.0, 100, None, 2, EarlyStopping(keep_best=True))
    train(line, adam(line), constant, config, TrainState(), Ranks(), recorded)
    assert [(step, state.best_step) for step, state in recorded.saved] == [(2, 2), (4, 4), (8, 8), (10, 8)]


def test_what_is_made_ahead_is_what_is_asked_for() -> None:
    """In order or not, each place is what its own arguments make of it; a failure is told to whoever asks for that
    place."""

    def make(step: int, micro: int) -> tuple[int, int]:
        made.append((step, micro))
        if step == 7:
            raise ValueError("step 7")
        return step, micro

    for in_thread in (True, False):
        made: list[tuple[int, int]] = []
        ahead = Prefetcher(make, in_thread=in_thread)
        asked = [(0, 0), (0, 1), (1, 0), (5, 0), (6, 0)]
        assert [
            ahead.get(place, then=(place[0] + 1, 0) if place[1] or place[0] else (0, 1)) for place in asked
        ] == asked
        with pytest.raises(ValueError, match="step 7"):
            ahead.get((7, 0), then=(8, 0))
        assert ahead.get((9, 0), then=(10, 0)) == (9, 0)
        ahead.close()
        assert made.count((1, 0)) == 1  # it was made ahead, and not again
        assert ((2, 0) in made) == in_thread  # made for nobody: step 5 came instead
