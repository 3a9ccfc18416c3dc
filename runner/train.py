"""The one step loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from runner.errors import Interrupted, NonFinite
from runner.optim import Optimizer
from runner.ranks import Ranks

SMOOTHING = 0.98  # of the loss that `status` and the index show; a step's own loss is mostly its timestep's
BAD_STEPS = 5  # in a row, before a run is given up


class Objective(Protocol):
    def loss(self, step: int, micro: int) -> Tensor:
        """Scalar; a function of its arguments and the trainable parameters alone."""

    def settle(self) -> None:
        """After an update: what must hold of the parameters is made to hold."""


@dataclass(frozen=True)
class Step:
    """What one optimisation step did; `number` counts from 1 over the whole run. `skipped`: it updated nothing.
    rows: norm and drift of the learned rows, by TensorBoard's names, where they were measured."""

    number: int
    loss: float
    smoothed: float | None
    grad_norm: float
    lr: float
    seconds: float
    skipped: bool
    rows: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Meters:
    """What crosses a checkpoint beside weights and optimizer; JSON values. skipped: steps that updated nothing, in_row:
    the last ones of them; scaler: the gradient scaler's own state."""

    smoothed: float | None = None
    eval_loss: float | None = None
    skipped: int = 0
    in_row: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loop:
    """Steps start+1 .. stop; `last` is the run's last one. A checkpoint every `save_every` steps, and once
    `save_seconds` have passed since the one before; a look every `look_every`."""

    start: int
    stop: int
    last: int
    accumulate: int
    max_grad_norm: float
    save_every: int
    save_seconds: float | None
    look_every: int | None


def train(
    objective: Objective,
    optimizer: Optimizer,
    factor: Callable[[int], float],
    loop: Loop,
    meters: Meters,
    ranks: Ranks,
    scaler: torch.amp.GradScaler,
    *,
    save: Callable[[int, Meters], None],
    report: Callable[[Step], None],
    look: Callable[[int], float],
    stop_requested: Callable[[], bool],
) -> None:
    """`save(step, meters)` is called every `save_every` steps, at the end and before stopping; `look(step)` gives the
    eval loss. Raises Interrupted after the last save, NonFinite where too many steps in a row had no finite gradient.
    """
    step, saved = loop.start, time.monotonic()
    if meters.scaler:
        scaler.load_state_dict(meters.scaler)
    while step < loop.stop:
        began = time.perf_counter()
        total = torch.zeros(())
        for micro in range(loop.accumulate):
            loss = objective.loss(step, micro) / loop.accumulate
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total = total.to(loss.device) + loss.detach()
        total = ranks.average(optimizer.parameters, total)
        scaler.unscale_(optimizer.torch)
        norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters, loop.max_grad_norm)
        value, grad_norm = torch.stack([total, norm]).tolist()  # the one wait for the device
        good = math.isfinite(value) and math.isfinite(grad_norm)
        calibrating = math.isfinite(value) and scaler.is_enabled() and scaler.get_scale() > 1
        if good:
            optimizer.step(factor(step))
            objective.settle()
        else:
            optimizer.drop()  # nothing of it reaches the weights
        scaler.update()
        step += 1
        meters = _after(meters, value, good, calibrating)
        report(
            Step(
                step, value, meters.smoothed, grad_norm, optimizer.effective_lr(), time.perf_counter() - began, not good
            )
        )
        if meters.in_row == BAD_STEPS:
            raise NonFinite(
                f"step {step}: no finite loss or gradient in {BAD_STEPS} steps in a row (loss {value}, gradient norm "
                f"{grad_norm}); nothing of them reached the weights. Lower train.lr, or use model.dtype bf16 or fp32"
            )
        if step == loop.last or (loop.look_every and step % loop.look_every == 0):
            meters = replace(meters, eval_loss=look(step))
        asked = ranks.any(stop_requested(), total.device)
        late = loop.save_seconds is not None and time.monotonic() - saved >= loop.save_seconds
        if asked or late or step == loop.stop or step % loop.save_every == 0:
            saved = time.monotonic()
            save(step, replace(meters, scaler=scaler.state_dict()))
        if asked:
            raise Interrupted(f"stopped after step {step}; the same command goes on from there")


def _after(meters: Meters, value: float, good: bool, calibrating: bool) -> Meters:
    """A gradient scaler finds its scale by overflowing: those steps are skipped too, but tell of nothing wrong."""
    if good:
        smoothed = value if meters.smoothed is None else SMOOTHING * meters.smoothed + (1 - SMOOTHING) * value
        return replace(meters, smoothed=smoothed, in_row=0)
    return replace(meters, skipped=meters.skipped + 1, in_row=meters.in_row + (not calibrating))
