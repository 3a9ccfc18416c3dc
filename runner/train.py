"""The one step loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from runner.errors import Interrupted, NonFinite
from runner.optim import Optimizer

SMOOTHING = 0.98  # of the loss that `status` and the index show; a step's own loss is mostly its timestep's


class Objective(Protocol):
    def loss(self, step: int, micro: int) -> Tensor:
        """Scalar; a function of its arguments and the trainable parameters alone."""

    def settle(self) -> None:
        """After an update: what must hold of the parameters is made to hold."""


@dataclass(frozen=True)
class Step:
    """What one optimisation step did; `number` counts from 1 over the whole run."""

    number: int
    loss: float
    smoothed: float
    grad_norm: float
    lr: float
    seconds: float


def train(
    objective: Objective,
    optimizer: Optimizer,
    factor: Callable[[int], float],
    *,
    start: int,
    stop: int,
    accumulate: int,
    max_grad_norm: float,
    save_every: int,
    smoothed: float | None,
    save: Callable[[int, float], None],
    report: Callable[[Step], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Steps start+1 .. stop. `save(step, smoothed)` is called every `save_every` steps, at the end and before stopping.

    Raises Interrupted after that last save, NonFinite where the loss or the gradient is no number (nothing is updated).
    """
    step = start
    while step < stop:
        began = time.perf_counter()
        total = torch.zeros(())
        for micro in range(accumulate):
            loss = objective.loss(step, micro) / accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total = total.to(loss.device) + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters, max_grad_norm)
        value, grad_norm = torch.stack([total, norm]).tolist()  # the one wait for the device
        if not (math.isfinite(value) and math.isfinite(grad_norm)):
            raise NonFinite(
                f"step {step + 1}: loss {value}, gradient norm {grad_norm}; the weights are as before this step. "
                "Lower train.lr, or use model.dtype bf16 or fp32"
            )
        optimizer.step(factor(step))
        objective.settle()
        step += 1
        smoothed = value if smoothed is None else SMOOTHING * smoothed + (1 - SMOOTHING) * value
        report(Step(step, value, smoothed, grad_norm, optimizer.effective_lr(), time.perf_counter() - began))
        asked = stop_requested()
        if asked or step == stop or step % save_every == 0:
            save(step, smoothed)
        if asked:
            raise Interrupted(f"stopped after step {step}; the same command goes on from there")
