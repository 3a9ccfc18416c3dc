"""From a spec and facts to a plan: phases, notes, and what makes a plan impossible."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from runner.base.architectures import adapted_layers, architecture_of
from runner.base.layers import CLIP_L, FLUX1, clip_layers
from runner.core.hashing import content_key
from runner.data import tokens
from runner.data.buckets import Size, group_by_bucket
from runner.plan.disk import run_bytes
from runner.plan.keys import OPEN_ENDED, RESULT_FORMAT, _result_values
from runner.plan.phases import Encode, Export, Facts, Part, Phase, Plan, Prior, TrainPhase
from runner.spec.schema import Spec


class PlanError(Exception):
    """Faults that a spec shows only beside its facts: (dotted key, message) each."""

    def __init__(self, faults: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {message}" for key, message in faults))
        self.faults = tuple(faults)


def make_plan(spec: Spec, facts: Facts) -> Plan:
    """Raises PlanError with everything that is wrong."""
    known = tokens.placeholders(spec.tokens)
    faults = [
        *_token_faults(spec, facts, known),
        *_layer_faults(spec, facts),
        *_data_faults(spec, facts),
    ]
    asked = spec.train.steps or _epoch_steps(spec, facts)
    if asked is None and spec.train.epochs is not None:
        faults.append(
            ("train.epochs", "the images of a hub data set are not counted before it is here; set train.steps")
        )
    if faults or asked is None:
        raise PlanError(faults)
    text_until = _until(spec.inversion.until) if known else spec.text_lora.until if spec.text_lora else 0
    text_stop, lora_stop = math.ceil(text_until * asked), math.ceil(spec.lora.until * asked)
    steps = max(text_stop, lora_stop)
    phases = _phases(spec, facts, known, text_stop, lora_stop)
    notes = (*_notes(spec, facts, asked, steps), *_caption_notes(facts, known))
    return Plan(
        spec.name,
        steps,
        phases,
        known,
        notes,
        _sizes(spec, facts),
        _texts(spec, facts),
        _disk(spec, facts, phases, steps),
    )


def resolutions(spec: Spec) -> tuple[int, ...]:
    own = spec.data.resolution
    return (own,) if isinstance(own, int) else own


def _until(value: float | None) -> float:
    assert value is not None  # the spec resolves it
    return value


def _epoch_steps(spec: Spec, facts: Facts) -> int | None:
    if facts.images is None or spec.train.epochs is None:
        return None
    per_step = spec.train.batch_size * spec.train.accumulate * spec.compute.gpus
    views = (facts.images - spec.data.holdout) * len(resolutions(spec)) * spec.data.repeats
    return math.ceil(views / per_step) * spec.train.epochs


def _sizes(spec: Spec, facts: Facts) -> dict[Size, int] | None:
    if facts.images is None:
        return None
    sizes = facts.sizes or ((1, 1),) * (facts.images - spec.data.holdout)
    return {size: len(found) for size, found in group_by_bucket(sizes, resolutions(spec), spec.data.buckets).items()}


def _texts(spec: Spec, facts: Facts) -> int | None:
    if facts.captions is None:
        return None
    more = ([spec.prior.prompt] if spec.prior else []) + ([""] if spec.data.caption_dropout > 0 else [])
    return len({*facts.captions, *more})


# Numbers that an optimizer keeps per trained number, in fp32's size (Prodigy: two moments, its sum and its start).
MOMENTS = {"adamw": 2.0, "adamw8bit": 0.5, "prodigy": 4.0}


def _disk(spec: Spec, facts: Facts, phases: Sequence[Phase], steps: int) -> int:
    """A base whose config only the hub has is taken for a FLUX.1 of the published shape."""
    training = [phase for phase in phases if isinstance(phase, TrainPhase)]
    parts = {part.what: part.parameters for phase in training for part in phase.trains}
    if "lora" in parts and parts["lora"] is None:
        parts["lora"] = _lora_count(spec, replace(facts, config=FLUX1))
    trained = sum(count or 0 for count in parts.values())
    return run_bytes(spec, trained, MOMENTS[spec.optimizer.name], len(training), steps)


def _phases(
    spec: Spec, facts: Facts, known: Sequence[tokens.Placeholder], text_stop: int, lora_stop: int
) -> tuple[Phase, ...]:
    length = None if spec.schedule.name in OPEN_ENDED else max(text_stop, lora_stop)
    values = json.dumps(_result_values(spec), sort_keys=True)
    key = content_key("run", RESULT_FORMAT, values, length, facts.data, facts.base)

    def chained(*what: str | int) -> str:
        nonlocal key
        key = content_key(key, *what)
        return key

    text, lora = _text_part(spec, facts, known), Part("lora", (), _lora_count(spec, facts))
    live, encoders = text.encoders if text else (), architecture_of(facts.config).encoders
    phases: list[Phase] = []
    if spec.prior is not None:
        phases.append(Prior("prior", 0, spec.prior.count, chained("prior")))
    phases.append(Encode("encode", 0, tuple(name for name in encoders if name not in live), True, chained("encode")))
    start = 0
    for stop in sorted({text_stop, lora_stop} - {0}):
        with_lora = stop <= lora_stop
        if text and stop <= text_stop:
            kind: Literal["joint", "inversion", "lora"] = "joint" if with_lora else "inversion" if known else "lora"
            name = "text-lora" if kind == "lora" else kind
            trains = (text, lora) if with_lora else (text,)
            phases.append(TrainPhase(kind, name, start, stop, trains, chained(name, start)))
        else:
            if live:  # the pivot: the text side is fixed from here on, so every caption can be encoded
                phases.append(Encode("encode-learned", start, live, False, chained("encode", start)))
            phases.append(TrainPhase("lora", "lora", start, stop, (lora,), chained("lora", start)))
        start = stop
        chained("ends", stop)
    pictures = len(spec.validation.prompts) * spec.validation.count
    made = [
        spec.name,
        *(table.model_dump(mode="json", exclude_defaults=True) for table in (spec.validation, spec.export)),
    ]
    shown = json.dumps(made, sort_keys=True)
    read = tuple(name for name, encoder in encoders.items() if name in live or not encoder.large)
    phases.append(Export("export", start, pictures, read, content_key(key, "export", shown)))
    return tuple(phases)


def _text_part(spec: Spec, facts: Facts, known: Sequence[tokens.Placeholder]) -> Part | None:
    """What learns in the text encoders. The spec allows one kind in a run."""
    if known:
        vectors = sum(len(placeholder.pieces) for placeholder in known)
        return Part("token rows", spec.inversion.encoders, vectors * _width(facts, spec.inversion.encoders))
    if spec.text_lora:
        layers = clip_layers(facts.clip or CLIP_L)
        return Part(
            "text lora", ("clip",), sum(spec.text_lora.rank * (out + inside) for out, inside in layers.values())
        )
    return None


def _width(facts: Facts, learning: Sequence[str]) -> int:
    config = facts.config or {}
    widths = {"clip": config.get("pooled_projection_dim", 768), "t5": config.get("joint_attention_dim", 4096)}
    return sum(widths[encoder] for encoder in learning)


def _lora_count(spec: Spec, facts: Facts) -> int | None:
    if facts.config is None:
        return None
    chosen = adapted_layers(facts.config, spec.lora.layers)
    return sum(spec.lora.rank * (out + inside) for out, inside in chosen.values())


def _notes(spec: Spec, facts: Facts, asked: int, steps: int) -> Iterator[str]:
    if steps < asked:
        side = f"inversion.until = {spec.inversion.until:g}" if spec.tokens else ""
        side = f"text_lora.until = {spec.text_lora.until:g}" if spec.text_lora else side
        yield (
            f"nothing is left to train after step {steps} (lora.until = {spec.lora.until:g}{', ' if side else ''}{side}): "
            f"the run ends there, not at the {asked} steps asked for"
        )
    if facts.config is not None and not facts.config.get("guidance_embeds"):
        yield "this base has no guidance embedding, so train.guidance has no effect"
    if spec.tokens and spec.inversion.encoders == ("clip",):
        yield "T5 reads the new tokens' placeholder text as it stands; only CLIP learns rows (inversion.encoders)"


def _caption_notes(facts: Facts, known: Sequence[tokens.Placeholder]) -> Iterator[str]:
    bare = [caption for caption in facts.captions or () if known and not tokens.tokens_in_caption(caption, known)]
    if bare:
        yield (
            f"{len(bare)} of {len(facts.captions or ())} captions name no token, so their images teach it nothing "
            f"(the first is {bare[0]!r}); write {known[0].name} into them, if that was not meant"
        )


def _data_faults(spec: Spec, facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.images is not None and spec.data.holdout >= facts.images:
        yield (
            "data.holdout",
            f"leaves nothing to train on (found {spec.data.holdout}, there are {facts.images} images); lower it",
        )


def _layer_faults(spec: Spec, facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.config is None or spec.lora.until == 0:
        return
    wanted = (spec.lora.layers,) if isinstance(spec.lora.layers, str) else spec.lora.layers
    for entry in wanted:
        chosen = adapted_layers(facts.config, entry if isinstance(spec.lora.layers, str) else (entry,))
        if not chosen:
            yield (
                "lora.layers",
                f"no linear layer of the transformer ends in this (found {entry!r}); allowed are the presets attention, "
                "attention+mlp, all, or names like attn.to_q, single_transformer_blocks.0.proj_mlp",
            )


def _token_faults(spec: Spec, facts: Facts, known: Sequence[tokens.Placeholder]) -> Iterator[tuple[str, str]]:
    if not facts.captions:  # unknown, or all held out, which is told elsewhere
        return
    used = {name for caption in facts.captions for name in tokens.tokens_in_caption(caption, known)}
    for index, placeholder in enumerate(known):
        if placeholder.name not in used:
            yield (
                f"tokens.{index}.name",
                f"no caption names this token (found {placeholder.name!r}), so it would learn nothing; write it as a "
                f"whole word in data.prompt or the captions (the first caption is {facts.captions[0]!r})",
            )
