"""The training phases: joint, inversion and LoRA are one function; what differs is who learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint, Weights
from runner.model import lora
from runner.model.family import TrainSettings
from runner.plan.phases import TrainPhase, gradient_checkpointing, trained_encoders, trains_lora
from runner.spec.schema import Spec, Stop
from runner.training import optimizers
from runner.training.adapter_shapes import lora_shape
from runner.training.context import RunContext
from runner.training.encoders import CachedEncoder
from runner.training.live_encoder import LiveEncoder
from runner.training.loop import EarlyStopping, LoopConfig, Step, TrainState, after_validation, train
from runner.training.objective import Encoders, FlowObjective
from runner.training.optimizers import AdamW8bitParams, AdamWParams, Optimizer, ParameterGroup, ProdigyParams, schedule
from runner.training.recorder import RunRecorder
from runner.training.validation import validate

ROW_POINTS = 100  # measurements of the token rows' norm and drift over a run; each one waits for the device


@dataclass
class PhaseCallbacks:
    """The loop's callbacks in one phase. recorder: None in the processes that assist, which write nothing.
    checkpoint: the last one made, in host memory."""

    context: RunContext
    phase: TrainPhase
    previous_weights: Weights
    adapter: Mapping[str, nn.Parameter]
    encoders: Encoders
    objective: FlowObjective
    optimizer: Optimizer
    recorder: RunRecorder | None
    checkpoint: Checkpoint | None = None

    def on_step(self, step: Step, state: TrainState) -> None:
        if self.recorder is None:
            return
        every = max(1, self.context.plan.steps // ROW_POINTS)
        if step.number % every == 0 or step.number == self.phase.stop:
            step = replace(step, rows=row_sizes(self.context, self.encoders))
        self.recorder.on_step(step, state)

    def on_validate(self, step: int, state: TrainState) -> TrainState:
        if self.recorder is None:
            return state
        result = validate(self.context, self.objective, step)
        state = after_validation(state, step, result.eval_loss)
        self.recorder.on_validation(step, result, state)
        return state

    def on_checkpoint(self, step: int, state: TrainState) -> None:
        tensors, numbers = self.optimizer.state()
        scalars = {"optimizer": numbers, "meters": vars(state)}
        weights = snapshot_weights(self.previous_weights, self.adapter, self.encoders)
        phase = self.phase
        self.checkpoint = storage.copy_to_host(Checkpoint(phase.name, phase.key, step, weights, tensors, scalars))
        if self.recorder is not None:
            self.recorder.save(self.checkpoint)

    def stop_requested(self) -> bool:
        return self.context.stop_requested()


def train_phase(
    context: RunContext, phase: TrainPhase, resume_from: Checkpoint | None, recorder: RunRecorder | None
) -> Checkpoint:
    """Train one phase and return its last checkpoint, which may still be on its way to the disk.

    resume_from: a checkpoint of this phase, or of the end of the phase before it. recorder: None in the processes that
    assist. If the phase ends early, all checkpoints are on the disk before the exception goes on.
    """
    context.model_pool.live_encoders.clear()
    previous_weights = resume_from.weights if resume_from else Weights()
    state = TrainState(**resume_from.scalars["meters"]) if resume_from else TrainState()
    transformer, adapter = load_transformer(context, phase, previous_weights)
    encoders = load_encoders(context, phase, previous_weights)
    optimizer = build_optimizer(context.spec, trainable(phase, adapter, encoders))
    if resume_from:
        optimizer.restore(resume_from.optimizer, resume_from.scalars["optimizer"])
    objective = FlowObjective(context, transformer, encoders)
    config = loop_config(context, phase, resume_from.step if resume_from else phase.start)
    callbacks = PhaseCallbacks(
        context, phase, previous_weights, adapter, encoders, objective, optimizer, recorder, resume_from
    )
    try:
        train(objective, optimizer, build_schedule(context), config, state, context.ranks, callbacks)
    except BaseException:
        if recorder is not None:
            recorder.flush()
        raise
    finally:
        objective.close()
    context.model_pool.release(context.base, context.spec.model, transformer)
    live = {name: encoder for name, encoder in encoders.items() if isinstance(encoder, LiveEncoder)}
    context.model_pool.live_encoders = live
    assert callbacks.checkpoint is not None  # a phase has a step, and its last one is saved
    return callbacks.checkpoint


def loop_config(context: RunContext, phase: TrainPhase, start: int) -> LoopConfig:
    """The loop's settings, from the spec. start: steps that are done."""
    spec = context.spec
    return LoopConfig(
        start, phase.stop, context.plan.steps, spec.train.accumulate * context.micro_batch_parts, spec.train.max_grad_norm,
        spec.checkpoint.every, spec.checkpoint.minutes and 60 * spec.checkpoint.minutes, spec.validation.every,
        EarlyStopping(**spec.stop.model_dump(), keep_best=spec.export.best or spec.stop != Stop()),
        scale_gradients=context.base.dtype == torch.float16,
    )  # fmt: skip


def load_transformer(
    context: RunContext, phase: TrainPhase, previous: Weights
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The frozen transformer and its adapter by name, {} where it has none yet; frozen too unless this phase trains it.

    previous: the weights of the phases before. Raises FluxrunError where this machine lacks the spec's attention.
    """
    transformer = context.model_pool.acquire(context.base)
    recompute = gradient_checkpointing(context.spec, token_rows=bool(trained_encoders(phase, "token rows")))
    model = context.spec.model
    settings = TrainSettings(model.attention, recompute, context.base.offload, model.compile)
    context.family.prepare_training(transformer, settings)
    adapter: dict[str, nn.Parameter] = {}
    if trains_lora(phase) or previous.lora:
        adapter = lora.attach_lora(transformer, lora_shape(context.spec, context.base), context.spec.seed)
        if previous.lora:
            lora.set_tensors(adapter, previous.lora)
        for parameter in adapter.values():
            parameter.requires_grad_(trains_lora(phase))
    if model.compile:
        transformer.compile_repeated_blocks()  # type: ignore[operator]
    return transformer.train(), adapter  # for the LoRA's dropout; the transformer itself has none


def load_encoders(context: RunContext, phase: TrainPhase, previous: Weights) -> Encoders:
    """Each text encoder: on the device if this phase trains something in it, else its embeddings from the cache."""
    rows, adapted = trained_encoders(phase, "token rows"), trained_encoders(phase, "text lora")
    return {
        name: LiveEncoder.load(context, name, previous, learn_rows=name in rows, learn_lora=name in adapted)
        if name in (*rows, *adapted)
        else CachedEncoder(context, name, previous)
        for name in context.encoders
    }


def trainable(
    phase: TrainPhase, adapter: Mapping[str, nn.Parameter], encoders: Encoders
) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters that this phase trains: kind -> checkpoint's name -> parameter."""
    live = {name: encoder for name, encoder in encoders.items() if isinstance(encoder, LiveEncoder)}
    return {
        "lora": {f"lora/{name}": value for name, value in adapter.items()} if trains_lora(phase) else {},
        "rows": {f"rows/{name}": encoder.rows for name, encoder in live.items() if encoder.rows is not None},
        "text_lora": {
            f"text_lora/{name}": value for encoder in live.values() for name, value in encoder.adapter.items()
        },
    }


def snapshot_weights(previous: Weights, adapter: Mapping[str, nn.Parameter], encoders: Encoders) -> Weights:
    """The weights as they are now: those that this phase trains, and the others from `previous`."""
    rows, text_lora = dict(previous.rows), dict(previous.text_lora)
    for name, encoder in encoders.items():
        if isinstance(encoder, LiveEncoder):
            if encoder.rows is not None:
                rows[name] = encoder.rows.detach()
            text_lora |= {key: value.detach() for key, value in encoder.adapter.items()}
    return Weights({name: value.detach() for name, value in adapter.items()}, rows, text_lora)


def row_sizes(context: RunContext, encoders: Encoders) -> dict[str, float]:
    """For every token and every encoder that learns it: "rows/norm TOK clip", the mean norm of its vectors; and
    "rows/drift TOK clip", their mean distance from their first values, as a share of those values' mean norm."""
    sizes: dict[str, float] = {}
    for name, encoder in encoders.items():
        if not isinstance(encoder, LiveEncoder) or encoder.rows is None or not encoder.rows.requires_grad:
            continue
        assert encoder.first_rows is not None  # set where rows are
        now, first = encoder.rows.detach(), encoder.first_rows  # [count, width]
        norms = torch.stack([now.norm(dim=1), (now - first).norm(dim=1), first.norm(dim=1)]).cpu()  # [3, count]
        start = 0
        for placeholder in context.plan.placeholders:
            norm, distance, first_norm = norms[:, start : start + len(placeholder.entries)].mean(1).tolist()
            sizes[f"rows/norm {placeholder.name} {name}"] = norm
            sizes[f"rows/drift {placeholder.name} {name}"] = distance / first_norm
            start += len(placeholder.entries)
    return sizes


def build_optimizer(spec: Spec, kinds: Mapping[str, Mapping[str, nn.Parameter]]) -> Optimizer:
    """One group per kind of parameter; a group without parameters is left out."""
    settings = spec.optimizer
    scale = spec.train.batch_size * spec.train.accumulate * spec.compute.gpus if spec.train.scale_lr else 1
    rates = {
        "lora": (spec.train.lr, settings.weight_decay),
        "rows": (spec.inversion.lr, spec.inversion.weight_decay),
        "text_lora": (spec.text_lora.lr if spec.text_lora else None, settings.weight_decay),
    }
    groups = []
    for kind, parameters in kinds.items():
        lr, weight_decay = rates[kind]
        if parameters:
            assert lr is not None  # the spec resolves it
            groups.append(ParameterGroup(parameters, lr * scale, weight_decay))
    hyperparameters = settings.model_dump(exclude={"name", "weight_decay"})
    kinds_of: dict[str, type[optimizers.AdamWParams | optimizers.AdamW8bitParams | optimizers.ProdigyParams]] = {
        "adamw": AdamWParams, "adamw8bit": AdamW8bitParams, "prodigy": ProdigyParams,
    }  # fmt: skip
    return Optimizer(groups, kinds_of[settings.name](**hyperparameters))


def build_schedule(context: RunContext) -> Callable[[int], float]:
    """The factor of the learning rates at each step, over all steps of the run."""
    settings, steps = context.spec.schedule, context.plan.steps
    return schedule(settings.name, warmup=settings.warmup, steps=steps, cycles=settings.cycles, power=settings.power)
