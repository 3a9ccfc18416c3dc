"""The training phases: joint, inversion and LoRA are one function; what differs is who learns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from runner import data, flux, lora
from runner.basefiles import linear_layers, lora_layers
from runner.checkpoint import Checkpoint, Weights
from runner.desk import Desk
from runner.device import autocast, move
from runner.encode import CachedEncoder, LiveEncoder, encode_latents
from runner.optim import Adam, Group, Optimizer, ProdigyNumbers, schedule
from runner.plan import Inversion, Joint, Lora
from runner.seeds import derive
from runner.spec import Spec
from runner.train import Step, train


class FlowObjective:
    """The reference's loss on one micro-batch; every random number comes from (seed, step, micro)."""

    def __init__(self, desk: Desk, transformer: nn.Module, encoders: Mapping[str, LiveEncoder | CachedEncoder]) -> None:
        spec = desk.spec
        self.desk, self.encoders = desk, encoders
        self.moments = [self._moments(index) for index in range(len(desk.pictures.items))]
        self.scale = flux.LatentScale.of(desk.base)
        weighting = spec.train.weighting.model_dump(exclude={"scheme"})
        self.flow = flux.Flow(desk.base, flux.Weighting(spec.train.weighting.scheme, **weighting))
        h, w = self.moments[0].shape[-2:]
        self.predict = flux.predictor(transformer, spec.train.guidance, h, w, desk.base.device, desk.base.dtype)

    def _moments(self, index: int) -> Tensor:
        value = self.desk.cache.get("latents", self.desk.latent_keys[index])
        if value is None:
            encode_latents(self.desk)
            value = self.desk.cache.get("latents", self.desk.latent_keys[index])
        assert value is not None
        return value

    def batch(self, step: int, micro: int) -> list[int]:
        own, count = self.desk.spec, len(self.moments)
        shown = count * own.data.repeats
        drawn = data.batch_indices(own.seed, step, micro, own.train.batch_size, own.train.accumulate, shown)
        return [index % count for index in drawn]

    def loss(self, step: int, micro: int) -> Tensor:
        device, seed = self.desk.base.device, self.desk.spec.seed
        chosen = self.batch(step, micro)
        generator = torch.Generator().manual_seed(derive(seed, "noise", step, micro))
        latents = flux.draw_latents(torch.stack([self.moments[index] for index in chosen]), self.scale, generator)
        drawn = self.flow.noise(latents, self.flow.draw(len(chosen), generator), generator)
        noised = flux.Noised(*(move(part, device) for part in (drawn.img, drawn.target, drawn.sigmas, drawn.timesteps)))
        if self.desk.spec.lora.dropout > 0:
            torch.manual_seed(derive(seed, "dropout", step, micro))  # dropout can only draw from the global generator
        captions = [self.desk.pictures.items[index].caption for index in chosen]
        read = flux.Text(self.encoders["t5"].embed(captions), self.encoders["clip"].embed(captions))
        with autocast(device, self.desk.base.dtype):
            prediction = self.predict(noised, read)
        return self.flow.loss(prediction, noised)

    def settle(self) -> None:
        for encoder in self.encoders.values():
            if isinstance(encoder, LiveEncoder):
                encoder.settle()


def lora_shape(desk: Desk) -> lora.LoraShape:
    own = desk.spec.lora
    config = json.loads((desk.base.folder / "transformer" / "config.json").read_text())
    assert own.alpha is not None  # the spec resolves it
    return lora.LoraShape(own.rank, own.alpha, own.dropout, tuple(lora_layers(linear_layers(config), own.layers)))


def train_phase(
    desk: Desk, phase: Joint | Inversion | Lora, before: Checkpoint | None,
    save: Callable[[Checkpoint], None], report: Callable[[Step], None],
) -> Checkpoint:  # fmt: skip
    """Train one phase from where `before` stands (this phase's own checkpoint, or the end of the one before it)."""
    past = before.weights if before else Weights()
    transformer = flux.load_transformer(desk.base)
    if desk.spec.model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    trains_lora = isinstance(phase, Joint | Lora)
    adapter: dict[str, nn.Parameter] = {}
    if trains_lora or past.lora:
        adapter = lora.attach_lora(transformer, lora_shape(desk), desk.spec.seed)
        if past.lora:
            lora.set_tensors(adapter, past.lora)
        for parameter in adapter.values():
            parameter.requires_grad_(trains_lora)
    transformer.train()  # LoRA's dropout; FLUX has none of its own

    learning = () if isinstance(phase, Lora) else phase.learning
    encoders: dict[str, LiveEncoder | CachedEncoder] = {}
    rows = {name: nn.Parameter(value.clone()) for name, value in past.rows.items()}
    for name in ("clip", "t5"):
        if name in learning:
            encoders[name] = live = LiveEncoder.load(desk, name, rows.get(name), learn=True)
            assert live.rows is not None
            rows[name] = live.rows
        else:
            encoders[name] = CachedEncoder(desk, name, past.rows.get(name))
    optimizer = build_optimizer(desk.spec, adapter if trains_lora else {}, {name: rows[name] for name in learning})
    if before:
        optimizer.restore(before.optimizer, before.scalars["optimizer"])

    def checkpoint(step: int, smoothed: float) -> Checkpoint:
        tensors, numbers = optimizer.state()
        weights = Weights(
            {name: parameter.detach() for name, parameter in adapter.items()},
            {name: parameter.detach() for name, parameter in rows.items()},
        )
        return Checkpoint(phase.name, phase.key, step, weights, tensors, {"optimizer": numbers, "loss": smoothed})

    last: list[Checkpoint] = [before] if before else []

    def keep(step: int, smoothed: float) -> None:
        last[:] = [checkpoint(step, smoothed)]
        save(last[0])

    own = desk.spec.train
    train(
        FlowObjective(desk, transformer, encoders), optimizer, build_schedule(desk),
        start=before.step if before else phase.start, stop=phase.stop, accumulate=own.accumulate,
        max_grad_norm=own.max_grad_norm, save_every=desk.spec.checkpoint.every,
        smoothed=before.scalars["loss"] if before else None,
        save=keep, report=report, stop_requested=desk.stop_requested,
    )  # fmt: skip
    return last[0]


def build_optimizer(spec: Spec, adapter: Mapping[str, nn.Parameter], rows: Mapping[str, nn.Parameter]) -> Optimizer:
    """One group per kind of parameter; a group without parameters is left out."""
    own = spec.optimizer
    scale = spec.train.batch_size * spec.train.accumulate * spec.compute.gpus if spec.train.scale_lr else 1
    assert spec.train.lr is not None
    assert spec.inversion.lr is not None  # the spec resolves both
    groups = [
        Group(
            {f"lora/{name}": parameter for name, parameter in adapter.items()}, spec.train.lr * scale, own.weight_decay
        ),
        Group(
            {f"rows/{name}": parameter for name, parameter in rows.items()},
            spec.inversion.lr * scale,
            spec.inversion.weight_decay,
        ),
    ]
    numbers = own.model_dump(exclude={"name", "weight_decay"})
    built = ProdigyNumbers(**numbers) if own.name == "prodigy" else Adam(**numbers)
    return Optimizer([group for group in groups if group.parameters], built)


def build_schedule(desk: Desk) -> Callable[[int], float]:
    own = desk.spec.schedule
    return schedule(own.name, warmup=own.warmup, steps=desk.plan.steps, cycles=own.cycles, power=own.power)
