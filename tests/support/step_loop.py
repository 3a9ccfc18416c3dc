"""The step loop on a model of two numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from runner.training.distributed import Ranks
from runner.training.loop import LoopConfig, Step, TrainState, train
from runner.training.optimizers import Adam, Optimizer, ParameterGroup


class Line:
    """Two numbers pulled to a target; `bad` names the steps whose loss is no number, `huge` those that overflow fp16."""

    def __init__(self, bad: tuple[int, ...] = (), huge: float = 1.0) -> None:
        self.weight = nn.Parameter(torch.tensor([3.0, -4.0]))
        self.bad, self.huge, self.settled = bad, huge, 0

    def loss(self, step: int, micro: int) -> Tensor:
        del micro
        factor = math.nan if step in self.bad else 1.0
        half = self.weight.half() if self.huge > 1 else self.weight  # whose gradient overflows beyond 65,504
        return self.huge * half.float().square().sum() * factor

    def settle(self) -> None:
        self.settled += 1


def run(
    line: Line,
    stop: int = 8,
    *,
    meters: TrainState | None = None,
    start: int = 0,
    max_grad_norm: float = 1e9,
    fp16: bool = False,
) -> tuple[list[Step], list[tuple[int, TrainState, Tensor]]]:
    optimizer = Optimizer([ParameterGroup({"lora/w": line.weight}, 0.1, 0.0)], Adam(0.9, 0.999, 1e-8))
    steps: list[Step] = []
    saved: list[tuple[int, TrainState, Tensor]] = []
    train(
        line, optimizer, lambda _: 1.0, LoopConfig(start, stop, stop, 1, max_grad_norm, 2, None, None), meters or TrainState(), Ranks(),
        torch.amp.GradScaler("cpu", enabled=fp16),
        save=lambda step, now: saved.append((step, now, line.weight.detach().clone())), report=steps.append,
        look=lambda step: float(step), stop_requested=lambda: False,
    )  # fmt: skip
    return steps, saved
