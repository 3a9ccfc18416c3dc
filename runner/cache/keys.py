"""What names an entry of the cache: a hash of everything that goes into it. No torch, so that `plan` can look them up."""

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
    """One embedding: the caption with its tokens written out, where CLIP's pooled vector is read, how many tokens are."""

    written: str
    pooling: str
    length: int


def captions(spec: Spec, pictures: Pictures) -> tuple[str, ...]:
    """Every caption or prompt that training, evaluation or a picture may read, as written."""
    return tuple(dict.fromkeys([
        *pictures.captions,
        *(picture.caption for picture in pictures.held),
        *([""] if spec.data.caption_dropout > 0 else []),
        *([spec.prior.prompt] if spec.prior else []),
        *spec.validation.prompts,
    ]))  # fmt: skip


def poolings(spec: Spec, encoder: TextEncoder) -> tuple[str, ...]:
    """Where an encoder's pooled vector is read. Pictures are drawn by stock diffusers, so its way is always there."""
    own = spec.inversion.pooling if encoder.pooled else "diffusers"
    return ("diffusers", "eos") if own == "both" else tuple(dict.fromkeys(("diffusers", own)))


def entry(spec: Spec, encoder: TextEncoder, written: str, pooling: str) -> Entry:
    return Entry(written, pooling, encoder.length or spec.model.max_sequence_length)


def entries(spec: Spec, pictures: Pictures, known: Sequence[Placeholder], encoder: TextEncoder) -> Iterator[Entry]:
    """All that `encoder` has to read. A large one also reads the prompts as they stand, for the pictures of the untuned base."""
    for caption in captions(spec, pictures):
        for pooling in poolings(spec, encoder):
            yield entry(spec, encoder, tokens.expand_placeholders(caption, known), pooling)
    for prompt in spec.validation.prompts if encoder.large else ():
        yield entry(spec, encoder, prompt, "diffusers")


def text_key(
    encoder: TextEncoder, asked: Entry, prints: Mapping[str, str], dtype: str, learned: str = NOTHING_LEARNED,
    scale: Sequence[float] = (), held: Sequence[str] = (),
) -> str:  # fmt: skip
    """prints: fingerprints of the base's parts; dtype: as torch writes it; learned: digest of what was learned in the
    encoder; scale: its LoRA's alpha, if it has one; held: what it is quantised to, if it is."""
    parts = [prints[part] for part in encoder.parts]
    pooling = asked.pooling if encoder.pooled else None
    return content_key(encoder.name, asked.written, learned, *parts, asked.length, dtype, *scale, pooling, *held)


def views_key(spec: Spec, data: str, vae: str, dtype: str) -> str | None:
    """Of the list of latents that a data set comes to. data, vae: fingerprints. None where the bytes of the data are not
    in its fingerprint: a name on the hub may stand for others tomorrow."""
    if not Path(spec.data.source).exists():
        return None
    own: dict[str, Any] = spec.data.model_dump(mode="json", exclude={"source", "workers", "repeats", "caption_dropout"})
    seed = None if own["center_crop"] and not own["random_flip"] else spec.seed
    return content_key("views", data, vae, dtype, json.dumps(own, sort_keys=True), seed, _pillow())


@cache
def _pillow() -> str:
    return version("pillow")
