"""From a spec and facts to a plan: its steps, its phases and their resume keys."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from runner.base.architectures import adapted_layers, architecture_of
from runner.base.layers import CLIP_L, FLUX1, clip_layers
from runner.core.hashing import content_key
from runner.data.buckets import Size, group_by_bucket
from runner.data.tokens import Placeholder, placeholders
from runner.plan.disk import run_bytes
from runner.plan.faults import PlanError, plan_faults, plan_notes
from runner.plan.keys import OPEN_ENDED, RESULT_FORMAT, result_values
from runner.plan.phases import Encode, Export, Facts, Part, Phase, Plan, Prior, TrainPhase
from runner.spec.schema import Spec


def make_plan(spec: Spec, facts: Facts) -> Plan:
    """Raises PlanError with everything that is wrong."""
    tokens = placeholders(spec.tokens)
    faults = list(plan_faults(spec, facts, tokens))
    asked_steps = spec.train.steps or _epoch_steps(spec, facts)
    if asked_steps is None and spec.train.epochs is not None:
        faults.append(
            ("train.epochs", "the images of a hub data set are not counted before it is here; set train.steps")
        )
    if faults or asked_steps is None:
        raise PlanError(faults)
    text_stop, lora_stop = math.ceil(_text_until(spec) * asked_steps), math.ceil(spec.lora.until * asked_steps)
    steps = max(text_stop, lora_stop)
    phases = _phases(spec, facts, tokens, text_stop, lora_stop)
    return Plan(
        spec.name,
        steps,
        phases,
        tokens,
        tuple(plan_notes(spec, facts, tokens, asked_steps, steps)),
        _views_by_size(spec, facts),
        _distinct_texts(spec, facts),
        _disk_bytes(spec, facts, phases, steps),
    )


def resolutions(spec: Spec) -> tuple[int, ...]:
    resolution = spec.data.resolution
    return (resolution,) if isinstance(resolution, int) else resolution


def _epoch_steps(spec: Spec, facts: Facts) -> int | None:
    if facts.image_count is None or spec.train.epochs is None:
        return None
    views_per_step = spec.train.batch_size * spec.train.accumulate * spec.compute.gpus
    views = (facts.image_count - spec.data.holdout) * len(resolutions(spec)) * spec.data.repeats
    return math.ceil(views / views_per_step) * spec.train.epochs


def _text_until(spec: Spec) -> float:
    """The share of the steps after which the text side is no longer trained."""
    if spec.tokens:
        assert spec.inversion.until is not None  # the loader fills it in
        return spec.inversion.until
    return spec.text_lora.until if spec.text_lora else 0.0


def _views_by_size(spec: Spec, facts: Facts) -> dict[Size, int] | None:
    if facts.image_count is None:
        return None
    sizes = facts.sizes or ((1, 1),) * (facts.image_count - spec.data.holdout)
    groups = group_by_bucket(sizes, resolutions(spec), spec.data.buckets)
    return {size: len(views) for size, views in groups.items()}


def _distinct_texts(spec: Spec, facts: Facts) -> int | None:
    if facts.captions is None:
        return None
    more = ([spec.prior.prompt] if spec.prior else []) + ([""] if spec.data.caption_dropout > 0 else [])
    return len({*facts.captions, *more})


def _disk_bytes(spec: Spec, facts: Facts, phases: Sequence[Phase], steps: int) -> int:
    """A base whose config only the hub has is assumed to have the shape of FLUX.1."""
    training = [phase for phase in phases if isinstance(phase, TrainPhase)]
    parameters = {part.what: part.parameters for phase in training for part in phase.trains}
    if "lora" in parameters and parameters["lora"] is None:
        parameters["lora"] = _lora_parameters(spec, replace(facts, transformer=FLUX1))
    return run_bytes(spec, sum(count or 0 for count in parameters.values()), len(training), steps)


# ---- phases ----------------------------------------------------------------------------------------------------------


def _phases(
    spec: Spec, facts: Facts, tokens: Sequence[Placeholder], text_stop: int, lora_stop: int
) -> tuple[Phase, ...]:
    """text_stop, lora_stop: the steps after which the text side and the LoRA are no longer trained."""
    length = None if spec.schedule.name in OPEN_ENDED else max(text_stop, lora_stop)
    values = json.dumps(result_values(spec), sort_keys=True)
    key = content_key("run", RESULT_FORMAT, values, length, facts.data_fingerprint, facts.base_fingerprint)

    def chain(*what: str | int) -> str:
        """The key of what comes next, which depends on everything before it."""
        nonlocal key
        key = content_key(key, *what)
        return key

    text, lora = _text_part(spec, facts, tokens), Part("lora", (), _lora_parameters(spec, facts))
    trained_encoders, encoders = text.encoders if text else (), architecture_of(facts.transformer).encoders
    phases: list[Phase] = []
    if spec.prior is not None:
        phases.append(Prior("prior", 0, spec.prior.count, chain("prior")))
    phases.append(
        Encode("encode", 0, tuple(name for name in encoders if name not in trained_encoders), True, chain("encode"))
    )
    start = 0
    for stop in sorted({text_stop, lora_stop} - {0}):
        with_lora = stop <= lora_stop
        if text and stop <= text_stop:
            kind: Literal["joint", "inversion", "lora"] = "joint" if with_lora else "inversion" if tokens else "lora"
            name = "text-lora" if kind == "lora" else kind
            trains = (text, lora) if with_lora else (text,)
            phases.append(TrainPhase(kind, name, start, stop, trains, chain(name, start)))
        else:
            if trained_encoders:  # the pivot: from here on the text side is fixed, so every caption can be encoded
                phases.append(Encode("encode-learned", start, trained_encoders, False, chain("encode", start)))
            phases.append(TrainPhase("lora", "lora", start, stop, (lora,), chain("lora", start)))
        start = stop
        chain("ends", stop)
    samples = len(spec.validation.prompts) * spec.validation.count
    read = tuple(name for name, encoder in encoders.items() if name in trained_encoders or not encoder.large)
    phases.append(Export("export", start, samples, read, content_key(key, "export", _export_values(spec))))
    return tuple(phases)


def _export_values(spec: Spec) -> str:
    """What decides the exports of the same weights."""
    tables = [table.model_dump(mode="json", exclude_defaults=True) for table in (spec.validation, spec.export)]
    return json.dumps([spec.name, *tables], sort_keys=True)


def _text_part(spec: Spec, facts: Facts, tokens: Sequence[Placeholder]) -> Part | None:
    """What is trained in the text encoders. The spec allows one kind in a run."""
    if tokens:
        vectors = sum(len(placeholder.entries) for placeholder in tokens)
        return Part("token rows", spec.inversion.encoders, vectors * _row_width(facts, spec.inversion.encoders))
    if spec.text_lora:
        layers = clip_layers(facts.clip or CLIP_L)
        parameters = sum(spec.text_lora.rank * (out + inside) for out, inside in layers.values())
        return Part("text lora", ("clip",), parameters)
    return None


def _row_width(facts: Facts, encoders: Sequence[str]) -> int:
    """Numbers of a token's rows in all of these encoders together."""
    config = facts.transformer or {}
    widths = {"clip": config.get("pooled_projection_dim", 768), "t5": config.get("joint_attention_dim", 4096)}
    return sum(widths[encoder] for encoder in encoders)


def _lora_parameters(spec: Spec, facts: Facts) -> int | None:
    if facts.transformer is None:
        return None
    layers = adapted_layers(facts.transformer, spec.lora.layers)
    return sum(spec.lora.rank * (out + inside) for out, inside in layers.values())
