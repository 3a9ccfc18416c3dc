"""The one step loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from runner.core.errors import InterruptedRunError, NonFiniteError
from runner.training.distributed import Ranks
from runner.training.optimizers import Optimizer

SMOOTHING = 0.98  # of the loss that `status` and the index show; a step's own loss is mostly its timestep's
BAD_STEPS = 5  # in a row, before a run is given up
CURVE_POINTS = 512  # of the smoothed loss at most, however long the run


class Objective(Protocol):
    def loss(self, step: int, micro: int) -> Tensor:
        """Scalar; a function of its arguments and the trainable parameters alone."""

    def settle(self) -> None:
        """After an update: what must hold of the parameters is made to hold."""


@dataclass(frozen=True)
class Step:
    """What one optimisation step did; `number` counts from 1 over the whole run. lr: the learning rate of each kind of
    parameter ("lora", "rows", "text_lora") that learns. `skipped`: it updated nothing. rows: norm and drift of
    the learned rows, by TensorBoard's names, where they were measured."""

    number: int
    loss: float
    smoothed: float | None
    grad_norm: float
    lr: Mapping[str, float]
    seconds: float
    skipped: bool
    rows: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainState:
    """What crosses a checkpoint beside weights and optimizer; JSON values. skipped: steps that updated nothing, in_row:
    the last ones of them; best: the lowest eval loss, of best_step; ended: by which rule training ended early; scaler: the
    gradient scaler's own state; curve: [step, smoothed loss], evenly spaced."""

    smoothed: float | None = None
    eval_loss: float | None = None
    skipped: int = 0
    in_row: int = 0
    best: float | None = None
    best_step: int | None = None
    ended: str = ""
    scaler: dict[str, Any] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class EarlyStopping:
    """When training ends before its last step, by the eval loss of a look: it was not lower for `no_better_for` steps; it
    is above `loss_above`; it has come down to `at`. None where a rule is off. `keep_best`: the best step is saved."""

    no_better_for: int | None = None
    loss_above: float | None = None
    at: float | None = None
    keep_best: bool = False

    def reason(self, meters: TrainState, step: int) -> str:
        loss, best, best_step = meters.eval_loss, meters.best, meters.best_step
        if loss is None or best_step is None:
            return ""
        if self.at is not None and loss <= self.at:
            return f"eval loss {loss:.5f} at step {step} has come down to stop.at ({self.at:g})"
        if self.loss_above is not None and loss > self.loss_above:
            return f"eval loss {loss:.5f} at step {step} is above stop.loss_above ({self.loss_above:g})"
        if self.no_better_for is not None and step - best_step >= self.no_better_for:
            return (
                f"no eval loss below {best:.5f} of step {best_step} for {step - best_step} steps (stop.no_better_for)"
            )
        return ""


@dataclass(frozen=True)
class LoopConfig:
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
    early: EarlyStopping = EarlyStopping()


def train(
    objective: Objective,
    optimizer: Optimizer,
    factor: Callable[[int], float],
    loop: LoopConfig,
    meters: TrainState,
    ranks: Ranks,
    scaler: torch.amp.GradScaler,
    *,
    save: Callable[[int, TrainState], None],
    report: Callable[[Step], None],
    look: Callable[[int], float | None],
    stop_requested: Callable[[], bool],
) -> None:
    """`save(step, meters)` is called every `save_every` steps, at the end (also an early one) and before stopping;
    `look(step)` gives the eval loss, in the leading rank and where it is wanted. Raises InterruptedRunError after the last save,
    NonFiniteError where too many steps in a row had no finite gradient.
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
        meters = _after(meters, step, value, good, calibrating)
        report(
            Step(
                step,
                value,
                meters.smoothed,
                grad_norm,
                optimizer.learning_rates(),
                time.perf_counter() - began,
                not good,
            )
        )
        if meters.in_row == BAD_STEPS:
            raise NonFiniteError(
                f"step {step}: no finite loss or gradient in {BAD_STEPS} steps in a row (loss {value}, gradient norm "
                f"{grad_norm}); nothing of them reached the weights. Lower train.lr (with Prodigy, optimizer.d_coef)"
                + (", or use model.dtype bf16 or fp32" if scaler.is_enabled() else "")
            )
        better = False
        if step == loop.last or (loop.look_every and step % loop.look_every == 0):
            before, meters = meters.best_step, is_validation_step(meters, step, look(step))
            better = loop.early.keep_best and meters.best_step != before
            if step < loop.last and ranks.leads:
                meters = replace(meters, ended=loop.early.reason(meters, step))
        asked, ended = (ranks.any(flag, total.device) for flag in (stop_requested(), bool(meters.ended)))
        if ended and not meters.ended:
            meters = replace(meters, ended="by the leading rank's look")
        late = loop.save_seconds is not None and time.monotonic() - saved >= loop.save_seconds
        if asked or ended or better or late or step == loop.stop or step % loop.save_every == 0:
            saved = time.monotonic()
            save(step, replace(meters, scaler=scaler.state_dict()))
        if ended:
            return
        if asked:
            raise InterruptedRunError(f"stopped after step {step}; the same command goes on from there")


def is_validation_step(meters: TrainState, step: int, eval_loss: float | None) -> TrainState:
    """With what a look has shown."""
    if eval_loss is None:
        return meters
    if math.isfinite(eval_loss) and (meters.best is None or eval_loss < meters.best):
        return replace(meters, eval_loss=eval_loss, best=eval_loss, best_step=step)
    return replace(meters, eval_loss=eval_loss)


def _after(meters: TrainState, step: int, value: float, good: bool, calibrating: bool) -> TrainState:
    """A gradient scaler finds its scale by overflowing: those steps are skipped too, but tell of nothing wrong."""
    if good:
        smoothed = value if meters.smoothed is None else SMOOTHING * meters.smoothed + (1 - SMOOTHING) * value
        return replace(meters, smoothed=smoothed, in_row=0, curve=_extended(meters.curve, step, smoothed))
    return replace(meters, skipped=meters.skipped + 1, in_row=meters.in_row + (not calibrating))


def _extended(curve: list[list[float]], step: int, smoothed: float) -> list[list[float]]:
    """Every step while they are few, then every second, fourth, ...: a function of the step alone, so it resumes exactly."""
    stride = 1
    while step > stride * CURVE_POINTS:
        stride *= 2
    if step % stride:
        return curve
    return [point for point in curve if point[0] % stride == 0] + [[step, smoothed]]
