"""The step loop. The joint, inversion and LoRA phases all run `train`; they differ only in what learns."""

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

SMOOTHING = 0.98  # decay of the smoothed loss in `status` and the index; one step's loss depends mostly on its timestep
BAD_STEPS = 5  # consecutive steps without a finite loss and gradient after which a run fails
CURVE_POINTS = 512  # at most this many points in TrainState.curve, however long the run


class Objective(Protocol):
    """What is minimized."""

    def loss(self, step: int, micro: int) -> Tensor:
        """The loss of one micro-batch, a scalar. It depends on the arguments and the trainable parameters alone."""

    def post_step(self) -> None:
        """Called after each update, to restore what must hold of the parameters (the scale of the token rows)."""


class Callbacks(Protocol):
    """What the loop calls between two steps, in the thread that trains."""

    def on_step(self, step: Step, state: TrainState) -> None:
        """Report a step. state: after it."""

    def on_validate(self, step: int, state: TrainState) -> TrainState:
        """Validate, and return the state with the result (`after_validation`). Ranks that do not lead return
        `state`."""

    def on_checkpoint(self, step: int, state: TrainState) -> None:
        """Save a checkpoint."""

    def stop_requested(self) -> bool:
        """Whether the user or the queue asked this process to stop."""


@dataclass(frozen=True)
class Step:
    """The facts about one optimization step.

    number: from 1, over the whole run. lr: by kind of parameter ("lora", "rows", "text_lora"), only the kinds that
    learn. skipped: loss or gradient was not finite, so nothing was updated. rows: norm and drift of the learned token
    rows under TensorBoard's tags; empty in steps where they were not measured.
    """

    number: int
    loss: float
    grad_norm: float
    lr: Mapping[str, float]
    seconds: float
    skipped: bool
    rows: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint keeps besides weights and optimizer, as JSON values ("meters" in its header).

    smoothed: the training loss, as an exponential moving average. skipped: number of skipped steps. in_row: consecutive
    skipped steps just before now, without those in which the gradient scaler was still calibrating. best, best_step:
    the lowest eval loss and its step. ended: the rule that ended training early. scaler: the gradient scaler's state.
    curve: [step, smoothed loss], evenly spaced.
    """

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
    """Rules that end training before its last step, checked after each validation. None: the rule is off.

    no_better_for: steps without a lower eval loss. loss_above: end when the eval loss is above this. at: end when it is
    at or below this. keep_best: save a checkpoint at each new lowest eval loss.
    """

    no_better_for: int | None = None
    loss_above: float | None = None
    at: float | None = None
    keep_best: bool = False

    def reason(self, state: TrainState, step: int) -> str:
        """The rule that ends training after this step, in words; "" if none does."""
        loss, best, best_step = state.eval_loss, state.best, state.best_step
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
    """Settings of the loop. It trains the steps start + 1 to stop; `last` is the last step of the run.

    accumulate: micro-batches per step. save_every: steps between checkpoints. save_seconds: the longest time between
    checkpoints. validate_every: steps between validations. scale_gradients: for fp16, whose small gradients underflow.
    """

    start: int
    stop: int
    last: int
    accumulate: int
    max_grad_norm: float
    save_every: int
    save_seconds: float | None
    validate_every: int | None
    early: EarlyStopping = EarlyStopping()
    scale_gradients: bool = False

    def validates_after(self, step: int) -> bool:
        return step == self.last or (self.validate_every is not None and step % self.validate_every == 0)

    def saves_after(self, step: int, seconds: float) -> bool:
        """Whether a checkpoint is due. seconds: since the last one."""
        overdue = self.save_seconds is not None and seconds >= self.save_seconds
        return overdue or step == self.stop or step % self.save_every == 0


def train(
    objective: Objective, optimizer: Optimizer, schedule: Callable[[int], float], config: LoopConfig, state: TrainState,
    ranks: Ranks, callbacks: Callbacks,
) -> None:  # fmt: skip
    """Train from `config.start`, where training is in `state`, to `config.stop`, or to an earlier end.

    schedule: step, from 0 -> factor of the learning rates. A checkpoint is saved after the last step, too. Raises
    InterruptedRunError if a stop was requested, after a checkpoint; NonFiniteError after BAD_STEPS bad steps in a row.
    """
    device = optimizer.parameters[0].device
    scaler = torch.amp.GradScaler(device.type, enabled=config.scale_gradients)
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    step, saved_at = config.start, time.monotonic()
    while step < config.stop:
        started = time.perf_counter()
        loss, grad_norm = _accumulate_gradients(objective, optimizer, scaler, ranks, config, step)

        # update, unless something is not finite
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        calibrating = math.isfinite(loss) and scaler.is_enabled() and scaler.get_scale() > 1
        if finite:
            optimizer.step(schedule(step))
            objective.post_step()
        else:
            optimizer.zero_grad()
        scaler.update()
        step += 1

        # report
        state = _after_step(state, step, loss, finite, calibrating)
        seconds = time.perf_counter() - started
        callbacks.on_step(Step(step, loss, grad_norm, optimizer.learning_rates(), seconds, not finite), state)
        if state.in_row == BAD_STEPS:
            raise _diverged(step, loss, grad_norm, scaled=scaler.is_enabled())

        # validate
        best_before = state.best_step
        if config.validates_after(step):
            state = callbacks.on_validate(step, state)
            if step < config.last and ranks.leads:
                state = replace(state, ended=config.early.reason(state, step))
        improved = config.early.keep_best and state.best_step != best_before

        # save, and stop
        stopping = ranks.any(callbacks.stop_requested(), device)
        ended = ranks.any(bool(state.ended), device)
        if ended and not state.ended:
            state = replace(state, ended="by the leading rank's eval loss")
        due = config.saves_after(step, time.monotonic() - saved_at)
        if due or improved or stopping or ended:
            saved_at = time.monotonic()
            callbacks.on_checkpoint(step, replace(state, scaler=scaler.state_dict()))
        if ended:
            return
        if stopping:
            raise InterruptedRunError(f"stopped after step {step}; the same command goes on from there")


def _accumulate_gradients(
    objective: Objective,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    ranks: Ranks,
    config: LoopConfig,
    step: int,
) -> tuple[float, float]:
    """Forward and backward over the micro-batches of one step: (loss, norm of the gradients before they are clipped).

    Leaves in the parameters the gradients of the mean loss over micro-batches and ranks, clipped to `max_grad_norm`.
    """
    total = torch.zeros(())
    for micro in range(config.accumulate):
        loss = objective.loss(step, micro) / config.accumulate
        scaler.scale(loss).backward()
        total = total.to(loss.device) + loss.detach()
    total = ranks.average(optimizer.parameters, total)
    scaler.unscale_(optimizer.torch)
    norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters, config.max_grad_norm)
    value, grad_norm = torch.stack([total, norm]).tolist()  # the only wait for the device in a step
    return value, grad_norm


def after_validation(state: TrainState, step: int, eval_loss: float | None) -> TrainState:
    """The state with a new eval loss; None: it was not measured. A loss that is not finite is never the best."""
    if eval_loss is None:
        return state
    if math.isfinite(eval_loss) and (state.best is None or eval_loss < state.best):
        return replace(state, eval_loss=eval_loss, best=eval_loss, best_step=step)
    return replace(state, eval_loss=eval_loss)


def _after_step(state: TrainState, step: int, loss: float, finite: bool, calibrating: bool) -> TrainState:
    """calibrating: the gradient scaler is still looking for its scale. It does so by overflowing, so a step that it
    skips counts as skipped, but not as bad."""
    if finite:
        smoothed = loss if state.smoothed is None else SMOOTHING * state.smoothed + (1 - SMOOTHING) * loss
        return replace(state, smoothed=smoothed, in_row=0, curve=_extended(state.curve, step, smoothed))
    return replace(state, skipped=state.skipped + 1, in_row=state.in_row + (not calibrating))


def _extended(curve: list[list[float]], step: int, smoothed: float) -> list[list[float]]:
    """The curve with one more point: every step at first, then every second, fourth, ... step. Which steps are kept
    depends on `step` alone, so a resumed run has the same curve."""
    stride = 1
    while step > stride * CURVE_POINTS:
        stride *= 2
    if step % stride:
        return curve
    return [point for point in curve if point[0] % stride == 0] + [[step, smoothed]]


def _diverged(step: int, loss: float, grad_norm: float, *, scaled: bool) -> NonFiniteError:
    return NonFiniteError(
        f"step {step}: no finite loss or gradient in {BAD_STEPS} steps in a row (loss {loss}, gradient norm "
        f"{grad_norm}); nothing of them reached the weights. Lower train.lr (with Prodigy, optimizer.d_coef)"
        + (", or use model.dtype bf16 or fp32" if scaled else "")
    )
