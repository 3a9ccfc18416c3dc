"""What will happen: a Spec and the facts it names become Phases. Pure; no file is touched and no torch imported."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner import tokens
from runner.basefiles import linear_layers, lora_layers
from runner.digest import key_of
from runner.spec import Spec, dump

ENCODERS = ("clip", "t5")

# Values that leave the trained weights alone. Everything else is in every training phase's key. `data.source` and
# `model.base` are paths; what they point at is in the key by its fingerprint.
NOT_IN_KEY = (
    "name",
    "checkpoint",
    "track",
    "hub",
    "validate",
    "data.source",
    "data.workers",
    "model.base",
    "prior.images",
)


@dataclass(frozen=True)
class Facts:
    """What a plan must know of the world. Unknown (None) for what only the hub can tell."""

    captions: tuple[str, ...] | None  # distinct
    images: int | None
    data: str  # fingerprints
    base: str
    config: Mapping[str, Any] | None  # the transformer's


@dataclass(frozen=True)
class Encode:
    """Text embeddings and latents into the cache. `encoders`: those that read some caption here."""

    name: str
    at: int
    encoders: tuple[str, ...]
    latents: bool
    key: str


@dataclass(frozen=True)
class Joint:
    """Token rows and LoRA together. `learning`: the encoders whose rows learn. `rows`, `lora`: parameter counts."""

    name: str
    start: int
    stop: int
    learning: tuple[str, ...]
    rows: int
    lora: int | None
    key: str


@dataclass(frozen=True)
class Inversion:
    """Token rows alone; a LoRA that has stopped learning stays in place."""

    name: str
    start: int
    stop: int
    learning: tuple[str, ...]
    rows: int
    key: str


@dataclass(frozen=True)
class Lora:
    """LoRA alone: every caption is encoded, and the transformer has the device to itself."""

    name: str
    start: int
    stop: int
    lora: int | None
    key: str


@dataclass(frozen=True)
class Export:
    name: str
    at: int
    pictures: int
    key: str


Train = Joint | Inversion | Lora
Phase = Encode | Train | Export


@dataclass(frozen=True)
class Plan:
    """`steps` is where the run ends: sooner than asked when nothing is left to train. `notes` say such things."""

    name: str
    steps: int
    phases: tuple[Phase, ...]
    placeholders: tuple[tokens.Placeholder, ...]
    notes: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.phases[-1].key

    @property
    def training(self) -> tuple[Train, ...]:
        return tuple(phase for phase in self.phases if isinstance(phase, Train))


class PlanError(Exception):
    """Faults that a spec shows only beside its facts: (dotted key, message) each."""

    def __init__(self, faults: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {message}" for key, message in faults))
        self.faults = tuple(faults)


def make_plan(spec: Spec, facts: Facts) -> Plan:
    """Raises PlanError with everything that is wrong."""
    known = tokens.placeholders([(token.name, token.vectors, token.initializer) for token in spec.tokens])
    faults = [*_unavailable(spec), *_token_faults(spec, facts, known), *_layer_faults(spec, facts)]
    asked = spec.train.steps or _epoch_steps(spec, facts)
    if asked is None and spec.train.epochs is not None:
        faults.append(
            ("train.epochs", "the images of a hub data set are not counted before it is here; set train.steps")
        )
    if faults or asked is None:
        raise PlanError(faults)
    rows_stop = math.ceil(_until(spec.inversion.until) * asked) if known else 0
    lora_stop = math.ceil(spec.lora.until * asked)
    steps = max(rows_stop, lora_stop)
    phases = _phases(spec, facts, known, rows_stop, lora_stop)
    return Plan(spec.name, steps, phases, known, tuple(_notes(spec, asked, steps, rows_stop)))


def _until(value: float | None) -> float:
    assert value is not None  # the spec resolves it
    return value


def _epoch_steps(spec: Spec, facts: Facts) -> int | None:
    if facts.images is None or spec.train.epochs is None:
        return None
    per_step = spec.train.batch_size * spec.train.accumulate
    return math.ceil(facts.images * spec.data.repeats / per_step) * spec.train.epochs


def _phases(
    spec: Spec, facts: Facts, known: Sequence[tokens.Placeholder], rows_stop: int, lora_stop: int
) -> tuple[Phase, ...]:
    learning = spec.inversion.encoders if known else ()
    vectors = sum(len(placeholder.pieces) for placeholder in known)
    rows, lora = vectors * _width(facts, learning), _lora_count(spec, facts)
    key = key_of("run", json.dumps(_result_values(spec), sort_keys=True), facts.data, facts.base)

    def chained(kind: str, *span: int) -> str:
        nonlocal key
        key = key_of(key, kind, *span)
        return key

    frozen = tuple(encoder for encoder in ENCODERS if encoder not in learning)
    phases: list[Phase] = [Encode("encode", 0, frozen, True, chained("encode"))]
    start = 0
    for stop in sorted({rows_stop, lora_stop} - {0}):
        with_rows, with_lora = stop <= rows_stop, stop <= lora_stop
        if with_rows and with_lora:
            phases.append(Joint("joint", start, stop, learning, rows, lora, chained("joint", start, stop)))
        elif with_rows:
            phases.append(Inversion("inversion", start, stop, learning, rows, chained("inversion", start, stop)))
        else:
            if learning:  # the pivot: the rows are fixed from here on, so every caption can be encoded
                phases.append(Encode("encode-learned", start, learning, False, chained("encode", start)))
            phases.append(Lora("lora", start, stop, lora, chained("lora", start, stop)))
        start = stop
    pictures = len(spec.validation.prompts) * spec.validation.count
    shown = json.dumps([spec.name, spec.validation.model_dump(mode="json")], sort_keys=True)
    phases.append(Export("export", start, pictures, key_of(key, "export", shown)))
    return tuple(phases)


def _result_values(spec: Spec) -> dict[str, Any]:
    """The spec less NOT_IN_KEY."""
    values = dump(spec)
    for dotted in NOT_IN_KEY:
        *tables, last = dotted.split(".")
        table = values
        for name in tables:
            table = table.get(name, {})
        table.pop(last, None)
    return values


def _width(facts: Facts, learning: Sequence[str]) -> int:
    config = facts.config or {}
    widths = {"clip": config.get("pooled_projection_dim", 768), "t5": config.get("joint_attention_dim", 4096)}
    return sum(widths[encoder] for encoder in learning)


def _lora_count(spec: Spec, facts: Facts) -> int | None:
    if facts.config is None:
        return None
    chosen = lora_layers(linear_layers(facts.config), spec.lora.layers)
    return sum(spec.lora.rank * (out + inside) for out, inside in chosen.values())


def _notes(spec: Spec, asked: int, steps: int, rows_stop: int) -> Iterator[str]:
    if steps < asked:
        yield (
            f"nothing is left to train after step {steps} (lora.until = {spec.lora.until:g}, inversion.until = "
            f"{spec.inversion.until:g}): the run ends there, not at the {asked} steps asked for"
        )
    if rows_stop and spec.inversion.encoders == ("clip",):
        yield "T5 reads the new tokens' placeholder text as it stands; only CLIP learns rows (inversion.encoders)"


def _layer_faults(spec: Spec, facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.config is None or spec.lora.until == 0:
        return
    layers = linear_layers(facts.config)
    wanted = (spec.lora.layers,) if isinstance(spec.lora.layers, str) else spec.lora.layers
    for entry in wanted:
        chosen = lora_layers(layers, entry if isinstance(spec.lora.layers, str) else (entry,))
        if not chosen:
            yield (
                "lora.layers",
                f"no linear layer of the transformer ends in this (found {entry!r}); allowed are the presets attention, "
                "attention+mlp, all, or names like attn.to_q, single_transformer_blocks.0.proj_mlp",
            )


def _token_faults(spec: Spec, facts: Facts, known: Sequence[tokens.Placeholder]) -> Iterator[tuple[str, str]]:
    if facts.captions is None:
        return
    used = {name for caption in facts.captions for name in tokens.named(caption, known)}
    for index, placeholder in enumerate(known):
        if placeholder.name not in used:
            yield (
                f"tokens.{index}.name",
                f"no caption names this token (found {placeholder.name!r}), so it would learn nothing; write it as a "
                f"whole word in data.prompt or the captions (the first caption is {facts.captions[0]!r})",
            )


def _unavailable(spec: Spec) -> Iterator[tuple[str, str]]:
    """Keys that the contract has and this version cannot honour: refused, never ignored."""
    wanted = {
        "model.dtype": spec.model.dtype == "fp16",
        "model.quantize": spec.model.quantize != "none",
        "model.compile": spec.model.compile,
        "data.buckets": spec.data.buckets,
        "data.resolution": not isinstance(spec.data.resolution, int),
        "data.caption_dropout": spec.data.caption_dropout > 0,
        "data.holdout": spec.data.holdout > 0,
        "prior": spec.prior is not None,
        "inversion.pooling": spec.inversion.pooling != "diffusers",
        "text_lora": spec.text_lora is not None,
        "optimizer.name": spec.optimizer.name == "adamw8bit",
        "validate.every": spec.validation.every is not None,
        "track.to": "wandb" in spec.track.to,
        "hub.push": spec.hub.push,
        "compute.gpus": spec.compute.gpus > 1,
    }
    for key, asked in wanted.items():
        if asked:
            value: Any = spec
            for part in key.replace("validate", "validation").split("."):
                value = getattr(value, part)
            found = "" if key in ("prior", "text_lora") else f" (found {value!r})"
            yield key, f"not available yet{found}; take it out, or wait for a later fluxrun"


# ---- as a document -------------------------------------------------------------------------------------------------


def describe(phase: Phase) -> dict[str, Any]:
    """One phase of `fluxrun plan --json`."""
    trains: list[dict[str, Any]] = []
    if isinstance(phase, Joint | Inversion):
        trains.append({"what": "token rows", "encoders": list(phase.learning), "parameters": phase.rows})
    if isinstance(phase, Joint | Lora):
        trains.append({"what": "lora", "parameters": phase.lora})
    start = phase.start if isinstance(phase, Train) else phase.at
    stop = phase.stop if isinstance(phase, Train) else phase.at
    kind = {Encode: "encode", Joint: "joint", Inversion: "inversion", Lora: "lora", Export: "export"}[type(phase)]
    return {
        "kind": kind,
        "name": phase.name,
        "start": start,
        "stop": stop,
        "trains": trains,
        "resident": list(resident(phase)),
    }


def resident(phase: Phase) -> tuple[str, ...]:
    """The modules on the device while the phase runs; one after the other in `encode` and `export`."""
    names = {"clip": "text_encoder", "t5": "text_encoder_2"}
    match phase:
        case Encode():
            return (*(names[e] for e in phase.encoders), *(("vae",) if phase.latents else ()))
        case Joint() | Inversion():
            return ("transformer", *(names[e] for e in phase.learning))
        case Lora():
            return ("transformer",)
        case Export():
            return ("text_encoder", "text_encoder_2", "transformer", "vae")


def as_json(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "steps": plan.steps,
        "notes": list(plan.notes),
        "phases": [describe(p) for p in plan.phases],
    }
