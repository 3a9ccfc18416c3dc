"""The training phases: joint, inversion and LoRA are one function; what differs is who learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint, Weights
from runner.model import lora
from runner.model.family import TrainSettings
from runner.plan.phases import TrainPhase, learned_parts, recomputed, trains_lora
from runner.spec.schema import Spec, Stop
from runner.training import optimizers
from runner.training.adapter_shapes import lora_shape
from runner.training.context import RunContext
from runner.training.encoders import CachedEncoder, LiveEncoder
from runner.training.loop import EarlyStopping, LoopConfig, Step, TrainState, train
from runner.training.objective import Encoders, FlowObjective
from runner.training.optimizers import Adam, Adam8bit, Optimizer, ParameterGroup, ProdigyNumbers, schedule
from runner.training.validation import Validator

ROW_POINTS = 100  # of norm and drift over a run: each waits for the device


def train_phase(
    context: RunContext, phase: TrainPhase, before: Checkpoint | None,
    save: Callable[[Checkpoint], None], settle: Callable[[], None], report: Callable[[Step], None],
    show: Callable[[int, Validator], None],
) -> Checkpoint:  # fmt: skip
    """Train one phase from where `before` stands (this phase's own checkpoint, or the end of the one before it).

    `save` may only begin to write; `settle` returns once all of it is written, and is for a phase that ends too early: the
    next one need not wait for the disk.
    """
    context.model_pool.live.clear()
    past = before.weights if before else Weights()
    meters = TrainState(**before.scalars["meters"]) if before else TrainState()
    transformer, adapter = load_transformer(context, phase, past)
    encoders = load_encoders(context, phase, past)
    optimizer = build_optimizer(context.spec, trainable(phase, adapter, encoders))
    if before:
        optimizer.restore(before.optimizer, before.scalars["optimizer"])
    objective = FlowObjective(context, transformer, encoders)
    last: list[Checkpoint] = [before] if before else []

    def keep(step: int, now: TrainState) -> None:
        tensors, numbers = optimizer.state()
        scalars = {"optimizer": numbers, "meters": vars(now)}
        weights = weights_now(past, adapter, encoders)
        last[:] = [storage.copied(Checkpoint(phase.name, phase.key, step, weights, tensors, scalars))]
        if context.ranks.leads:
            save(last[0])

    def look(step: int) -> float | None:
        if not context.ranks.leads:
            return None
        found = Validator.at(context, objective, step)
        show(step, found)
        return found.eval_loss

    def tell(step: Step) -> None:
        measured = step.number % max(1, context.plan.steps // ROW_POINTS) == 0 or step.number == phase.stop
        report(replace(step, rows=row_sizes(context, encoders)) if measured and context.ranks.leads else step)

    own = context.spec
    loop = LoopConfig(
        before.step if before else phase.start, phase.stop, context.plan.steps, own.train.accumulate * context.split,
        own.train.max_grad_norm, own.checkpoint.every, own.checkpoint.minutes and 60 * own.checkpoint.minutes,
        own.validation.every,
        EarlyStopping(**own.stop.model_dump(), keep_best=own.export.best or own.stop != Stop()),
    )  # fmt: skip
    try:
        train(
            objective, optimizer, build_schedule(context), loop, meters, context.ranks,
            torch.amp.GradScaler(context.base.device.type, enabled=context.base.dtype == torch.float16),
            save=keep, report=tell, look=look, stop_requested=context.stop_requested,
        )  # fmt: skip
    except BaseException:
        settle()
        raise
    finally:
        objective.close()
    context.model_pool.put(context.base, context.spec.model, transformer)
    context.model_pool.live = {name: one for name, one in encoders.items() if isinstance(one, LiveEncoder)}
    return last[0]


def load_transformer(
    context: RunContext, phase: TrainPhase, past: Weights
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The frozen base with its adapter, {} where it has none yet; the adapter learns only if the phase says so."""
    transformer = context.model_pool.take(context.base)
    recompute = recomputed(context.spec, rows=bool(learned_parts(phase, "token rows")))
    model = context.spec.model
    settings = TrainSettings(model.attention, recompute, context.base.offload, model.compile)
    context.family.prepare_training(transformer, settings)
    adapter: dict[str, nn.Parameter] = {}
    if trains_lora(phase) or past.lora:
        adapter = lora.attach_lora(transformer, lora_shape(context.spec, context.base), context.spec.seed)
        if past.lora:
            lora.set_tensors(adapter, past.lora)
        for parameter in adapter.values():
            parameter.requires_grad_(trains_lora(phase))
    if model.compile:
        transformer.compile_repeated_blocks()  # type: ignore[operator]
    return transformer.train(), adapter  # for LoRA's dropout; FLUX has none of its own


def load_encoders(context: RunContext, phase: TrainPhase, past: Weights) -> Encoders:
    rows, adapted = learned_parts(phase, "token rows"), learned_parts(phase, "text lora")
    return {
        name: LiveEncoder.load(context, name, past, learn_rows=name in rows, learn_lora=name in adapted)
        if name in (*rows, *adapted)
        else CachedEncoder(context, name, past)
        for name in context.encoders
    }


def trainable(
    phase: TrainPhase, adapter: Mapping[str, nn.Parameter], encoders: Encoders
) -> dict[str, dict[str, nn.Parameter]]:
    """What the optimizer gets: by kind, under the checkpoint's names."""
    live = {name: encoder for name, encoder in encoders.items() if isinstance(encoder, LiveEncoder)}
    return {
        "lora": {f"lora/{name}": value for name, value in adapter.items()} if trains_lora(phase) else {},
        "rows": {f"rows/{name}": one.rows for name, one in live.items() if one.rows is not None},
        "text_lora": {f"text_lora/{name}": value for one in live.values() for name, value in one.adapter.items()},
    }


def weights_now(past: Weights, adapter: Mapping[str, nn.Parameter], encoders: Encoders) -> Weights:
    """What has been learned so far: what this phase trains as it is, the rest as it was."""
    rows, text_lora = dict(past.rows), dict(past.text_lora)
    for name, encoder in encoders.items():
        if isinstance(encoder, LiveEncoder):
            if encoder.rows is not None:
                rows[name] = encoder.rows.detach()
            text_lora |= {key: value.detach() for key, value in encoder.adapter.items()}
    return Weights({name: value.detach() for name, value in adapter.items()}, rows, text_lora)


def row_sizes(context: RunContext, encoders: Encoders) -> dict[str, float]:
    """Of every token in every encoder that learns it: "rows/norm TOK clip", the mean length of its vectors; and
    "rows/drift TOK clip", their mean way from where they began, as a part of the length that they began with."""
    found = {}
    for name, encoder in encoders.items():
        if not isinstance(encoder, LiveEncoder) or encoder.rows is None or not encoder.rows.requires_grad:
            continue
        assert encoder.first_rows is not None  # set where rows are
        now, first = encoder.rows.detach(), encoder.first_rows
        sizes = torch.stack([now.norm(dim=1), (now - first).norm(dim=1), first.norm(dim=1)]).cpu()
        start = 0
        for placeholder in context.plan.placeholders:
            norm, way, began = sizes[:, start : start + len(placeholder.pieces)].mean(1).tolist()
            found[f"rows/norm {placeholder.name} {name}"] = norm
            found[f"rows/drift {placeholder.name} {name}"] = way / began
            start += len(placeholder.pieces)
    return found


def build_optimizer(spec: Spec, kinds: Mapping[str, Mapping[str, nn.Parameter]]) -> Optimizer:
    """One group per kind of parameter; a group without parameters is left out."""
    own = spec.optimizer
    scale = spec.train.batch_size * spec.train.accumulate * spec.compute.gpus if spec.train.scale_lr else 1
    rates = {
        "lora": (spec.train.lr, own.weight_decay),
        "rows": (spec.inversion.lr, spec.inversion.weight_decay),
        "text_lora": (spec.text_lora.lr if spec.text_lora else None, own.weight_decay),
    }
    groups = []
    for kind, parameters in kinds.items():
        lr, weight_decay = rates[kind]
        if parameters:
            assert lr is not None  # the spec resolves it
            groups.append(ParameterGroup(parameters, lr * scale, weight_decay))
    numbers = own.model_dump(exclude={"name", "weight_decay"})
    kinds_of: dict[str, type[optimizers.Adam | optimizers.Adam8bit | optimizers.ProdigyNumbers]] = {
        "adamw": Adam, "adamw8bit": Adam8bit, "prodigy": ProdigyNumbers,
    }  # fmt: skip
    return Optimizer(groups, kinds_of[own.name](**numbers))


def build_schedule(context: RunContext) -> Callable[[int], float]:
    own = context.spec.schedule
    return schedule(own.name, warmup=own.warmup, steps=context.plan.steps, cycles=own.cycles, power=own.power)
