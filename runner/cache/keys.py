"""The keys of cache entries: hashes of everything that an entry depends on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from runner.base.architectures import TextEncoder
from runner.core import hashing
from runner.core.hashing import content_key
from runner.data import tokens
from runner.data.images import Pictures
from runner.data.tokens import Placeholder
from runner.spec.schema import Spec

NOTHING_LEARNED = hashing.sha256([])


@dataclass(frozen=True)
class Entry:
    """One embedding.

    expanded: the caption with its placeholders expanded. pooling: where CLIP's pooled vector is read, "diffusers" or
    "eos". length: the number of tokens read.
    """

    expanded: str
    pooling: str
    length: int


def captions(spec: Spec, pictures: Pictures) -> tuple[str, ...]:
    """Every caption and prompt that training, validation or a sample may need, as the user wrote it, each once."""
    return tuple(dict.fromkeys([
        *pictures.captions,
        *(picture.caption for picture in pictures.held_out),
        *([""] if spec.data.caption_dropout > 0 else []),
        *([spec.prior.prompt] if spec.prior else []),
        *spec.validation.prompts,
    ]))  # fmt: skip


def poolings(spec: Spec, encoder: TextEncoder) -> tuple[str, ...]:
    """Where an encoder's pooled vector is read. Always also diffusers' place, since diffusers draws the samples."""
    pooling = spec.inversion.pooling if encoder.pooled else "diffusers"
    return ("diffusers", "eos") if pooling == "both" else tuple(dict.fromkeys(("diffusers", pooling)))


def entry(spec: Spec, encoder: TextEncoder, expanded: str, pooling: str) -> Entry:
    """expanded: the text with placeholders expanded."""
    return Entry(expanded, pooling, encoder.length or spec.model.max_sequence_length)


def entries(
    spec: Spec, pictures: Pictures, placeholders: Sequence[Placeholder], encoder: TextEncoder
) -> Iterator[Entry]:
    """All embeddings that a run needs from an encoder. From a large one also those of the prompts without expansion,
    for the samples of the untrained base."""
    for caption in captions(spec, pictures):
        for pooling in poolings(spec, encoder):
            yield entry(spec, encoder, tokens.expand_placeholders(caption, placeholders), pooling)
    for prompt in spec.validation.prompts if encoder.large else ():
        yield entry(spec, encoder, prompt, "diffusers")


def text_key(
    encoder: TextEncoder, asked: Entry, fingerprints: Mapping[str, str], dtype: str, learned: str = NOTHING_LEARNED,
    scale: Sequence[float] = (), quantization: Sequence[str] = (),
) -> str:  # fmt: skip
    """The key of a text embedding.

    fingerprints: of the base's parts. dtype: as torch writes it. learned: digest of what was trained in the encoder.
    scale: its LoRA's alpha, if it has a LoRA. quantization: how it is quantized, if it is.
    """
    parts = [fingerprints[part] for part in encoder.parts]
    pooling = asked.pooling if encoder.pooled else None
    return content_key(
        encoder.name, asked.expanded, learned, *parts, asked.length, dtype, *scale, pooling, *quantization
    )


def views_key(spec: Spec, data: str, vae: str, dtype: str) -> str | None:
    """The key of the list of latent keys of a data set, which saves decoding its pictures again.

    data, vae: fingerprints. None if the data's fingerprint does not cover its bytes: a name on the hub may stand for
    other data tomorrow.
    """
    if not Path(spec.data.source).exists():
        return None
    settings: dict[str, Any] = spec.data.model_dump(
        mode="json", exclude={"source", "workers", "repeats", "caption_dropout"}
    )
    seed = None if settings["center_crop"] and not settings["random_flip"] else spec.seed
    return content_key("views", data, vae, dtype, json.dumps(settings, sort_keys=True), seed, _pillow())


@cache
def _pillow() -> str:
    return version("pillow")
