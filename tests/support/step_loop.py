"""The step loop on a model of two numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from runner.training.distributed import Ranks
from runner.training.loop import LoopConfig, Step, TrainState, after_validation, train
from runner.training.optimizers import AdamWParams, Optimizer, ParameterGroup


class Line:
    """Two numbers pulled to a target; `bad` names the steps whose loss is no number, `huge` those that overflow
    fp16."""

    def __init__(self, bad: tuple[int, ...] = (), huge: float = 1.0) -> None:
        self.weight = nn.Parameter(torch.tensor([3.0, -4.0]))
        self.bad, self.huge, self.post_steps = bad, huge, 0

    def loss(self, step: int, micro: int) -> Tensor:
        del micro
        factor = math.nan if step in self.bad else 1.0
        half = self.weight.half() if self.huge > 1 else self.weight  # whose gradient overflows beyond 65,504
        return self.huge * half.float().square().sum() * factor

    def post_step(self) -> None:
        self.post_steps += 1


class Recorded:
    """The loop's callbacks: they keep what they are called with, and validate and stop as the test says."""

    def __init__(
        self, eval_loss: Callable[[int], float | None] = float, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        self.eval_loss, self.requested = eval_loss, stop_requested
        self.steps: list[Step] = []
        self.states: list[TrainState] = []
        self.saved: list[tuple[int, TrainState]] = []

    def on_step(self, step: Step, state: TrainState) -> None:
        self.steps.append(step)
        self.states.append(state)

    def on_validate(self, step: int, state: TrainState) -> TrainState:
        return after_validation(state, step, self.eval_loss(step))

    def on_checkpoint(self, step: int, state: TrainState) -> None:
        self.saved.append((step, state))

    def stop_requested(self) -> bool:
        return self.requested()


def adam(line: Line) -> Optimizer:
    return Optimizer([ParameterGroup({"lora/w": line.weight}, 0.1, 0.0)], AdamWParams(0.9, 0.999, 1e-8))


def constant(_: int) -> float:
    """A schedule that leaves the learning rate as it is."""
    return 1.0


def run(
    line: Line,
    stop: int = 8,
    *,
    state: TrainState | None = None,
    start: int = 0,
    max_grad_norm: float = 1e9,
    fp16: bool = False,
) -> tuple[list[Step], list[tuple[int, TrainState, Tensor]]]:
    """The steps; and step, state and weights of each checkpoint."""
    weights: list[Tensor] = []

    class Saving(Recorded):
        def on_checkpoint(self, step: int, state: TrainState) -> None:
            super().on_checkpoint(step, state)
            weights.append(line.weight.detach().clone())

    recorded = Saving()
    config = LoopConfig(start, stop, stop, 1, max_grad_norm, 2, None, None, scale_gradients=fp16)
    train(line, adam(line), constant, config, state or TrainState(), Ranks(), recorded)
    return recorded.steps, [(step, now, weight) for (step, now), weight in zip(recorded.saved, weights, strict=True)]
