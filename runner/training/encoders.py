"""Latents and text embeddings for training: computed by a live encoder or read from the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runner.base.architectures import TextEncoder
from runner.base.files import fingerprint
from runner.cache import keys
from runner.cache.keys import Entry
from runner.cache.store import Cache
from runner.checkpoint.storage import Weights
from runner.core import files, locks
from runner.core.errors import FluxrunError
from runner.data import tokens
from runner.model import lora, token_rows
from runner.model.base import Base
from runner.model.device import release, to_device
from runner.model.families import family_of
from runner.model.family import ModelFamily
from runner.plan.phases import Encode, Plan, gradient_checkpointing
from runner.spec.schema import Spec
from runner.training.adapter_shapes import text_lora_shape
from runner.training.context import RunContext
from runner.training.model_pool import ModelPool


def encode_latents(context: RunContext) -> None:
    missing = [view for view, key in context.latent_keys.items() if not context.cache.has("latents", key)]
    made = {context.latent_keys[view]: view for view in missing}  # equal pixels are encoded once
    context.event_log.line(f"encode: latents of {len(set(context.latent_keys.values()))} views, {len(made)} to make")
    if not made:
        return
    context.model_pool.clear(context.base)
    vae = context.family.load_vae(context.vae_base)
    context.event_log.begin_phase("encode latents", 0, len(made), "views")
    for done, (view, pixels) in enumerate(context.pixels(list(made.values())), 1):
        moments = context.family.encode_image(vae, torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        context.cache.put("latents", context.latent_keys[view], moments, {"image": view.picture.name})
        context.event_log.progress(done, len(made), "views")
        context.check_stop()
    del vae
    release(context.base.device)


def encode_texts(
    context: RunContext, encoder: str, weights: Weights, own: Mapping[str, Entry], others: Sequence[RunContext] = ()
) -> None:
    """`own`: what this run reads, by key; `others`: runs that come later."""
    later: dict[str, Entry] = {}
    for other in others:
        later |= other.entries(encoder, Weights())
    if own:
        context.event_log.line(
            f"encode: {encoder} embeddings of {len(own)} texts, {_count(context, encoder, own)} to make"
        )
    if ahead := _count(context, encoder, later.keys() - own.keys()):
        context.event_log.line(f"encode: {encoder} embeddings of {ahead} texts for runs that come later")
    entries = {**own, **later}
    if not _count(context, encoder, entries):
        return
    lock = files.make_folder(context.cache.folder, within=context.cache.folder.parent) / f".{encoder}.lock"
    with locks.hold_lock(
        lock, patience=math.inf, waiting=context.check_stop
    ):  # another slot may be making the very same
        missing = [(key, one) for key, one in entries.items() if not context.cache.has(encoder, key)]
        if missing:
            _make_texts(context, encoder, weights, missing)
    release(context.base.device)


def _count(context: RunContext, encoder: str, keys: Iterable[str]) -> int:
    return sum(not context.cache.has(encoder, key) for key in keys)


def _make_texts(context: RunContext, encoder: str, weights: Weights, missing: Sequence[tuple[str, Entry]]) -> None:
    if (
        context.encoders[encoder].large and encoder not in weights.rows
    ):  # one that learned fitted beside the transformer
        context.model_pool.clear(context.base)
    live = context.model_pool.live.get(encoder)
    if live is None or not live.holds(weights):
        live = LiveEncoder.load(context, encoder, weights)
    context.event_log.begin_phase(f"encode {encoder}", 0, len(missing), "texts")
    for done, (key, one) in enumerate(missing, 1):
        context.cache.put(encoder, key, live.read(one).cpu(), {})
        context.event_log.progress(done, len(missing), "texts")
        context.check_stop()


def reads(plan: Plan, encoder: str) -> bool:
    """Whether a run reads what `encoder` makes of texts as it is, before anything is learned."""
    return any(isinstance(phase, Encode) and phase.at == 0 and encoder in phase.encoders for phase in plan.phases)


def frozen_embeddings(
    encoder: TextEncoder, base: Base, cache: Cache, model_pool: ModelPool, spec: Spec, written: Sequence[str]
) -> list[Tensor]:
    """What one of the base's large encoders, as it is, makes of texts, [T, width] each; it is loaded only if the cache lacks
    one of them."""
    family, name = family_of(base), encoder.name
    prints = {part: fingerprint(base.folder / part) for part in encoder.parts}
    entries = [keys.entry(spec, encoder, text, "diffusers") for text in written]
    quantization = [base.quantize] if base.quantize != "none" else []
    wanted = [keys.text_key(encoder, entry, prints, str(base.dtype), held=quantization) for entry in entries]

    def make() -> None:
        model_pool.clear(base)
        live = LiveEncoder(family, name, family.load_encoder(base, name), family.load_tokenizer(base, name), 0.0)
        for key, entry in zip(wanted, entries, strict=True):
            cache.put(name, key, live.read(entry).cpu(), {})

    embeddings = cache.read(name, wanted, make)
    release(base.device)
    return [embeddings[key] for key in wanted]


class LiveEncoder:
    """A text encoder on the device with what was learned for it: token rows, or an adapter. Both are trainable parameters,
    frozen unless it was loaded to learn; it knows each caption's ids."""

    def __init__(self, family: ModelFamily, encoder: str, model: nn.Module, tokenizer: Any, std: float) -> None:
        self.family, self.encoder, self.model, self.tokenizer, self.std = family, encoder, model, tokenizer, std
        self.ids: dict[str, Tensor] = {}
        self.rows: nn.Parameter | None = None
        self.first_rows: Tensor | None = None  # what they began as
        self.adapter: Mapping[str, nn.Parameter] = {}
        self.checkpointed = False  # whether it runs again in the backward pass, instead of keeping its activations

    @classmethod
    def load(
        cls, context: RunContext, encoder: str, weights: Weights, *, learn_rows: bool = False, learn_lora: bool = False
    ) -> LiveEncoder:
        """`weights` are copied in. Where there is nothing to copy yet and it shall learn, it is initialised here, since
        rows are drawn at the table's scale."""
        family, asked = context.family, context.encoders[encoder]
        tokenizer, model = family.load_tokenizer(context.base, encoder), family.load_encoder(context.base, encoder)
        made = cls(family, encoder, model, tokenizer, token_rows.table_std(model))
        if asked.large and learn_rows:
            recompute, offloaded = gradient_checkpointing(context.spec, token_rows=True), context.base.offload
            checkpointed = recompute not in ("selective", 0)
            made.checkpointed = checkpointed and not offloaded  # offloaded blocks recompute themselves
            family.recompute_encoder(
                encoder, model, save_activations=checkpointed or offloaded, projections=recompute == "selective"
            )
        if encoder in weights.rows or learn_rows:
            counts = [(len(placeholder.entries), placeholder.initializer) for placeholder in context.plan.placeholders]
            made.first_rows = token_rows.initial_rows(model, tokenizer, counts, context.spec.seed, encoder).to(
                context.base.device
            )
            if encoder not in weights.rows:
                for vectors, phrase in counts:
                    pieces = len(tokenizer(phrase, add_special_tokens=False).input_ids) if phrase else 0
                    if pieces > vectors:
                        context.event_log.line(
                            f"tokens.initializer {phrase!r} has {pieces} pieces in {encoder}: its first {vectors} are used; "
                            f"tokens.vectors = {pieces} would use all"
                        )
            rows = weights.rows.get(encoder, made.first_rows)
            made.rows = nn.Parameter(rows.clone().to(context.base.device), requires_grad=learn_rows)
            token_rows.attach_token_rows(model, tokenizer, context.pieces, made.rows)
        if asked.lora_layers and (weights.text_lora or learn_lora):
            made.adapter = lora.attach_lora(model, text_lora_shape(context.spec, context.base), context.spec.seed)
            if weights.text_lora:
                lora.set_tensors(made.adapter, weights.text_lora)
            for parameter in made.adapter.values():
                parameter.requires_grad_(learn_lora)
        length = context.spec.model.max_sequence_length
        for caption in context.captions:
            written = tokens.expand_placeholders(caption, context.plan.placeholders)
            made.ids[caption] = made._ids(written, length)
        if learn_rows:
            made.check_tokens(context)
        return made

    def check_tokens(self, context: RunContext) -> None:
        """Rows that no caption brings as far as the encoder would learn nothing: each reads only so many tokens.

        Raises FluxrunError for a token that is cut off everywhere; says so where it is cut off in some captions.
        """
        for placeholder in context.plan.placeholders:
            wanted = set(self.tokenizer.convert_tokens_to_ids(list(placeholder.entries)))
            naming = [
                one
                for one in context.pictures.captions
                if tokens.tokens_in_caption(one, context.plan.placeholders) & {placeholder.name}
            ]
            cut = [caption for caption in naming if not wanted <= set(self.ids[caption].tolist())]
            if not cut:
                continue
            told = (
                f"{placeholder.name} lies behind the {len(self.ids[cut[0]])} tokens that {self.encoder} reads in "
                f"{len(cut)} of the {len(naming)} captions that name it (the first is {cut[0][:60]!r}...); move it to "
                "the front, or shorten them"
            )
            if len(cut) == len(naming):
                raise FluxrunError(told)
            context.event_log.line(told)

    def holds(self, weights: Weights) -> bool:
        """Whether it is as `weights` say, to the bit."""
        rows = weights.rows.get(self.encoder)
        adapter = weights.text_lora if self.family.architecture.encoders[self.encoder].lora_layers else {}
        if (rows is None) != (self.rows is None) or adapter.keys() != self.adapter.keys():
            return False
        same = [] if rows is None or self.rows is None else [(self.rows, rows)]
        same += [(self.adapter[name], adapter[name]) for name in adapter]
        return all(torch.equal(one.detach().cpu(), other.cpu()) for one, other in same)

    def read(self, asked: Entry) -> Tensor:
        """One embedding for the cache."""
        with torch.no_grad():
            return self._states(self._ids(asked.written, asked.length)[None], asked.pooling)[0]

    def _ids(self, written: str, length: int) -> Tensor:
        ids = self.family.token_ids(self.encoder, self.tokenizer, written, length)
        return ids.to(next(self.model.parameters()).device)

    def embed(self, captions: Sequence[str], pooling: str) -> Tensor:
        """A caption that several pictures have is read once. Where T5 runs a second time, its turn in the backward pass comes
        when the transformer's activations are gone."""
        each = list(dict.fromkeys(captions))
        ids = torch.stack([self.ids[caption] for caption in each])
        if self.checkpointed and torch.is_grad_enabled():
            found: Tensor = checkpoint(self._states, ids, pooling, use_reentrant=False, preserve_rng_state=False)
        else:
            found = self._states(ids, pooling)
        if len(each) == len(captions):
            return found
        return torch.stack([found[each.index(caption)] for caption in captions])

    def _states(self, ids: Tensor, pooling: str) -> Tensor:
        return self.family.embed(self.encoder, self.model, self.tokenizer, ids, pooling)

    def post_step(self) -> None:
        if self.rows is not None and self.rows.requires_grad:
            token_rows.keep_std(self.rows, self.std)


class CachedEncoder:
    """The same by look-up: embeddings wait in host memory, and the encoder is not there."""

    def __init__(self, context: RunContext, encoder: str, weights: Weights) -> None:
        self.device, self.encoder = context.base.device, context.encoders[encoder]
        key, known = context.text_keys(encoder, weights), context.plan.placeholders
        wanted = {
            (caption, pooling): key(
                keys.entry(context.spec, self.encoder, tokens.expand_placeholders(caption, known), pooling)
            )
            for caption in context.captions
            for pooling in keys.poolings(context.spec, self.encoder)
        }
        own = context.entries(encoder, weights)
        found = context.cache.read(encoder, wanted.values(), lambda: encode_texts(context, encoder, weights, own))
        self.values = {read: found[key] for read, key in wanted.items()}

    def look_up(self, captions: Sequence[str], pooling: str) -> Tensor:
        """In host memory."""
        chosen = pooling if self.encoder.pooled else "diffusers"
        return torch.stack([self.values[caption, chosen] for caption in captions])

    def embed(self, captions: Sequence[str], pooling: str) -> Tensor:
        return to_device(self.look_up(captions, pooling), self.device)

    def post_step(self) -> None:
        """Nothing here changes."""
