"""What makes a plan impossible, and what a user should know about one that is possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runner.base.architectures import adapted_layers
from runner.data.tokens import Placeholder, tokens_in_caption
from runner.plan.phases import Facts
from runner.spec.schema import Spec

KeyMessage = tuple[str, str]  # a dotted key, and what is wrong with it


class PlanError(Exception):
    """Faults of a spec that only show together with the facts: (dotted key, message) each."""

    def __init__(self, faults: Sequence[KeyMessage]) -> None:
        super().__init__("; ".join(f"{key}: {message}" for key, message in faults))
        self.faults = tuple(faults)


def plan_faults(spec: Spec, facts: Facts, placeholders: Sequence[Placeholder]) -> Iterator[KeyMessage]:
    """(key, message) of everything that is wrong, except for a number of steps that is not known."""
    yield from _token_faults(facts, placeholders)
    yield from _layer_faults(spec, facts)
    yield from _data_faults(spec, facts)


def plan_notes(
    spec: Spec, facts: Facts, placeholders: Sequence[Placeholder], asked_steps: int, steps: int
) -> Iterator[str]:
    """asked_steps: as the spec says; steps: where the run ends."""
    if steps < asked_steps:
        text_key = f"inversion.until = {spec.inversion.until:g}" if spec.tokens else ""
        text_key = f"text_lora.until = {spec.text_lora.until:g}" if spec.text_lora else text_key
        keys = f"lora.until = {spec.lora.until:g}{', ' if text_key else ''}{text_key}"
        yield (
            f"nothing is left to train after step {steps} ({keys}): "
            f"the run ends there, not at the {asked_steps} steps asked for"
        )
    if facts.transformer is not None and not facts.transformer.get("guidance_embeds"):
        yield "this base has no guidance embedding, so train.guidance has no effect"
    if spec.tokens and spec.inversion.encoders == ("clip",):
        yield "T5 reads the new tokens' placeholder text as it stands; only CLIP learns rows (inversion.encoders)"
    captions = facts.captions or ()
    without_token = [text for text in captions if placeholders and not tokens_in_caption(text, placeholders)]
    if without_token:
        yield (
            f"{len(without_token)} of {len(captions)} captions name no token, so their images teach it nothing "
            f"(the first is {without_token[0]!r}); write {placeholders[0].name} into them, if that was not meant"
        )


def _token_faults(facts: Facts, placeholders: Sequence[Placeholder]) -> Iterator[KeyMessage]:
    if not facts.captions:  # not known; or every image is held out, which `_data_faults` reports
        return
    used = {name for caption in facts.captions for name in tokens_in_caption(caption, placeholders)}
    for index, placeholder in enumerate(placeholders):
        if placeholder.name not in used:
            yield (
                f"tokens.{index}.name",
                f"no caption names this token (found {placeholder.name!r}), so it would learn nothing; write it as a "
                f"whole word in data.prompt or the captions (the first caption is {facts.captions[0]!r})",
            )


def _layer_faults(spec: Spec, facts: Facts) -> Iterator[KeyMessage]:
    if facts.transformer is None or spec.lora.until == 0:
        return
    is_preset = isinstance(spec.lora.layers, str)
    entries = (spec.lora.layers,) if isinstance(spec.lora.layers, str) else spec.lora.layers
    for entry in entries:
        if not adapted_layers(facts.transformer, entry if is_preset else (entry,)):
            yield (
                "lora.layers",
                f"no linear layer of the transformer ends in this (found {entry!r}); allowed are the presets attention, "
                "attention+mlp, all, or names like attn.to_q, single_transformer_blocks.0.proj_mlp",
            )


def _data_faults(spec: Spec, facts: Facts) -> Iterator[KeyMessage]:
    if facts.image_count is not None and spec.data.holdout >= facts.image_count:
        yield (
            "data.holdout",
            f"leaves nothing to train on (found {spec.data.holdout}, there are {facts.image_count} images); lower it",
        )
