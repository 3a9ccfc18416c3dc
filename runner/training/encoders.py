"""Latents and text embeddings for training, through the cache: what it lacks is encoded first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from runner.base.architectures import TextEncoder
from runner.base.files import fingerprint
from runner.cache import keys
from runner.cache.keys import Entry
from runner.cache.store import Cache
from runner.checkpoint.storage import Weights
from runner.core import files, locks
from runner.data import tokens
from runner.model.base import Base
from runner.model.device import release, to_device
from runner.model.families import family_of
from runner.plan.phases import Encode, Plan
from runner.spec.schema import Spec
from runner.training.context import RunContext
from runner.training.live_encoder import LiveEncoder
from runner.training.model_pool import ModelPool


def encode_latents(context: RunContext) -> None:
    """Encode the pictures that the cache lacks. Raises InterruptedRunError between two pictures if a stop was
    requested."""
    missing = [view for view, key in context.latent_keys.items() if not context.cache.has("latents", key)]
    views = {context.latent_keys[view]: view for view in missing}  # equal pixels are encoded once
    context.event_log.message(
        f"encode: latents of {len(set(context.latent_keys.values()))} views, {len(views)} to make"
    )
    if not views:
        return
    context.model_pool.clear(context.base)
    vae = context.family.load_vae(context.vae_base)
    context.event_log.begin_phase("encode latents", 0, len(views), "views")
    for done, (view, pixels) in enumerate(context.pixels(list(views.values())), 1):
        moments = context.family.encode_image(vae, torch.from_numpy(pixels.copy()).permute(2, 0, 1))  # [2*C, h, w]
        context.cache.put("latents", context.latent_keys[view], moments, {"image": view.picture.name})
        context.event_log.progress(done, len(views), "views")
        context.check_stop()
    del vae
    release(context.base.device)


def encode_texts(
    context: RunContext,
    encoder: str,
    weights: Weights,
    entries: Mapping[str, Entry],
    upcoming: Sequence[RunContext] = (),
) -> None:
    """Encode the texts that the cache lacks.

    weights: what was learned in the encoder. entries: what this run needs, by cache key. upcoming: later runs of the
    queue, which need the encoder as the base has it. Raises InterruptedRunError between two texts if a stop was
    requested.
    """
    later: dict[str, Entry] = {}
    for run in upcoming:
        later |= run.entries(encoder, Weights())
    if entries:
        missing = _count_missing(context, encoder, entries)
        context.event_log.message(f"encode: {encoder} embeddings of {len(entries)} texts, {missing} to make")
    if missing := _count_missing(context, encoder, later.keys() - entries.keys()):
        context.event_log.message(f"encode: {encoder} embeddings of {missing} texts for runs that come later")
    wanted = {**entries, **later}
    if not _count_missing(context, encoder, wanted):
        return
    lock = files.make_folder(context.cache.folder, within=context.cache.folder.parent) / f".{encoder}.lock"
    with locks.hold_lock(
        lock, timeout=math.inf, on_wait=context.check_stop
    ):  # another worker may encode the same texts
        unmade = [(key, entry) for key, entry in wanted.items() if not context.cache.has(encoder, key)]
        if unmade:
            _encode_entries(context, encoder, weights, unmade)
    release(context.base.device)


def _count_missing(context: RunContext, encoder: str, keys: Iterable[str]) -> int:
    return sum(not context.cache.has(encoder, key) for key in keys)


def _encode_entries(context: RunContext, encoder: str, weights: Weights, entries: Sequence[tuple[str, Entry]]) -> None:
    learned = encoder in weights.rows
    if context.encoders[encoder].large and not learned:  # one that learned had room beside the transformer
        context.model_pool.clear(context.base)
    live = context.model_pool.live_encoders.get(encoder)
    if live is None or not live.matches(weights):
        live = LiveEncoder.load(context, encoder, weights)
    context.event_log.begin_phase(f"encode {encoder}", 0, len(entries), "texts")
    for done, (key, entry) in enumerate(entries, 1):
        context.cache.put(encoder, key, live.embed_entry(entry).cpu(), {})
        context.event_log.progress(done, len(entries), "texts")
        context.check_stop()


def reads_untrained(plan: Plan, encoder: str) -> bool:
    """Whether a run needs embeddings of this encoder as the base has it."""
    return any(isinstance(phase, Encode) and phase.at == 0 and encoder in phase.encoders for phase in plan.phases)


def frozen_embeddings(
    encoder: TextEncoder, base: Base, cache: Cache, model_pool: ModelPool, spec: Spec, texts: Sequence[str]
) -> list[Tensor]:
    """The embedding of each text by one of the base's large encoders, as the base has it: [T, width] each, from the
    cache.

    texts: with placeholders expanded. The encoder is loaded only if the cache lacks one of them.
    """
    family, name = family_of(base), encoder.name
    fingerprints = {part: fingerprint(base.folder / part) for part in encoder.parts}
    entries = [keys.entry(spec, encoder, text, "diffusers") for text in texts]
    quantization = [base.quantize] if base.quantize != "none" else []
    wanted = [
        keys.text_key(encoder, entry, fingerprints, str(base.dtype), quantization=quantization) for entry in entries
    ]

    def encode_all() -> None:
        model_pool.clear(base)
        live = LiveEncoder(family, name, family.load_encoder(base, name), family.load_tokenizer(base, name), 0.0)
        for key, entry in zip(wanted, entries, strict=True):
            cache.put(name, key, live.embed_entry(entry).cpu(), {})

    embeddings = cache.read(name, wanted, encode_all)
    release(base.device)
    return [embeddings[key] for key in wanted]


class CachedEncoder:
    """A text encoder that is not loaded: its embeddings are read from the cache once and stay in host memory."""

    def __init__(self, context: RunContext, encoder: str, weights: Weights) -> None:
        """weights: what was learned in the encoder. Embeddings that the cache lacks are made first."""
        self.device, self.encoder = context.base.device, context.encoders[encoder]
        key_of, placeholders = context.text_keys(encoder, weights), context.plan.placeholders
        wanted = {
            (caption, pooling): key_of(
                keys.entry(context.spec, self.encoder, tokens.expand_placeholders(caption, placeholders), pooling)
            )
            for caption in context.captions
            for pooling in keys.poolings(context.spec, self.encoder)
        }
        entries = context.entries(encoder, weights)
        embeddings = context.cache.read(
            encoder, wanted.values(), lambda: encode_texts(context, encoder, weights, entries)
        )
        self.embeddings = {asked: embeddings[key] for asked, key in wanted.items()}  # by (caption, pooling)

    def look_up(self, captions: Sequence[str], pooling: str) -> Tensor:
        """Embeddings of B captions, in host memory."""
        read_at = pooling if self.encoder.pooled else "diffusers"
        return torch.stack([self.embeddings[caption, read_at] for caption in captions])

    def embed(self, captions: Sequence[str], pooling: str) -> Tensor:
        """The same on the device."""
        return to_device(self.look_up(captions, pooling), self.device)

    def post_step(self) -> None:
        """Nothing in it learns."""
