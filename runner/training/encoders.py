"""Latents and text embeddings for training: computed by a live encoder or read from the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runner.base.files import fingerprint
from runner.cache import keys
from runner.cache.keys import Entry
from runner.cache.store import Cache
from runner.checkpoint.storage import Weights
from runner.core import files, locks
from runner.core.errors import FluxrunError
from runner.data import tokens
from runner.model import lora
from runner.model.base import Base
from runner.model.device import move_module, release
from runner.model.flux1 import latents, loading, text_encoders
from runner.model.lora import text_lora_shape
from runner.plan.phases import Encode, Plan, recomputed
from runner.spec.schema import Spec
from runner.training.context import RunContext
from runner.training.model_pool import ModelPool


def encode_latents(context: RunContext) -> None:
    missing = [view for view, key in context.latent_keys.items() if not context.cache.has("latents", key)]
    made = {context.latent_keys[view]: view for view in missing}  # equal pixels are encoded once
    context.event_log.line(f"encode: latents of {len(set(context.latent_keys.values()))} views, {len(made)} to make")
    if not made:
        return
    context.model_pool.clear(context.base)
    vae = loading.load_vae(context.vae_base)
    context.event_log.begin_phase("encode latents", 0, len(made), "views")
    for done, (view, pixels) in enumerate(context.pixels(list(made.values())), 1):
        moments = latents.encode_image(vae, torch.from_numpy(pixels.copy()).permute(2, 0, 1))
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
    if encoder == "t5" and "t5" not in weights.rows:  # a T5 that learned was beside the transformer already
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


def frozen_t5(base: Base, cache: Cache, model_pool: ModelPool, spec: Spec, written: Sequence[str]) -> list[Tensor]:
    """What the base's own T5 makes of texts, [T, width] each; it is loaded only if the cache lacks one."""
    prints = {part: fingerprint(base.folder / part) for part in keys.PARTS["t5"]}
    entries = [keys.entry(spec, "t5", one, "diffusers") for one in written]
    held = [base.quantize] if base.quantize != "none" else []
    wanted = [keys.text_key("t5", one, prints, str(base.dtype), held=held) for one in entries]

    def make() -> None:
        model_pool.clear(base)
        live = LiveEncoder("t5", loading.load_t5(base), loading.load_tokenizer(base, "t5"), 0.0)
        for key, one in zip(wanted, entries, strict=True):
            cache.put("t5", key, live.read(one).cpu(), {})

    found = cache.read("t5", wanted, make)
    release(base.device)
    return [found[key] for key in wanted]


class LiveEncoder:
    """A text encoder on the device with what was learned for it: token rows, or an adapter (CLIP's). Both are trainable
    parameters, frozen unless it was loaded to learn; it knows each caption's ids."""

    def __init__(self, encoder: str, model: nn.Module, tokenizer: Any, std: float) -> None:
        self.encoder, self.model, self.tokenizer, self.std = encoder, model, tokenizer, std
        self.ids: dict[str, Tensor] = {}
        self.rows: nn.Parameter | None = None
        self.first_rows: Tensor | None = None  # what they began as
        self.adapter: Mapping[str, nn.Parameter] = {}
        self.again = False  # whether its activations are made again in the backward pass, rather than kept

    @classmethod
    def load(
        cls, context: RunContext, encoder: str, weights: Weights, *, learn_rows: bool = False, learn_lora: bool = False
    ) -> LiveEncoder:
        """`weights` are copied in. Where there is nothing to copy yet and it shall learn, it is initialised here, since
        rows are drawn at the table's scale."""
        tokenizer, model = loading.load_tokenizer(context.base, encoder), loading.load_encoder(context.base, encoder)
        made = cls(encoder, model, tokenizer, text_encoders.table_std(model))
        if encoder == "t5" and learn_rows:
            from runner.model.flux1.recompute_t5 import enable_recompute

            how = recomputed(context.spec, rows=True)
            twice = how not in ("selective", 0)
            made.again = twice and not context.base.offload  # where each block does so by itself
            enable_recompute(model, plain=twice or context.base.offload, again=how == "selective")
        if encoder in weights.rows or learn_rows:
            counts = [(len(placeholder.entries), placeholder.initializer) for placeholder in context.plan.placeholders]
            made.first_rows = text_encoders.initial_rows(model, tokenizer, counts, context.spec.seed, encoder).to(
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
            text_encoders.attach_token_rows(model, tokenizer, context.pieces, made.rows)
        if encoder == "clip" and (weights.text_lora or learn_lora):
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
        rows, adapter = weights.rows.get(self.encoder), weights.text_lora if self.encoder == "clip" else {}
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
        found = (
            text_encoders.clip_ids(self.tokenizer, written)
            if self.encoder == "clip"
            else text_encoders.t5_ids(self.tokenizer, written, length)
        )
        return found.to(next(self.model.parameters()).device)

    def embed(self, captions: Sequence[str], pooling: str) -> Tensor:
        """A caption that several pictures have is read once. Where T5 runs a second time, its turn in the backward pass comes
        when the transformer's activations are gone."""
        each = list(dict.fromkeys(captions))
        ids = torch.stack([self.ids[caption] for caption in each])
        if self.again and torch.is_grad_enabled():
            found: Tensor = checkpoint(self._states, ids, pooling, use_reentrant=False, preserve_rng_state=False)
        else:
            found = self._states(ids, pooling)
        if len(each) == len(captions):
            return found
        return torch.stack([found[each.index(caption)] for caption in captions])

    def _states(self, ids: Tensor, pooling: str) -> Tensor:
        if self.encoder == "t5":
            return text_encoders.t5_states(self.model, ids)
        eos = None if pooling == "diffusers" else int(self.tokenizer.eos_token_id)
        return text_encoders.clip_pooled(self.model, ids, eos)

    def settle(self) -> None:
        if self.rows is not None and self.rows.requires_grad:
            text_encoders.keep_std(self.rows, self.std)


class CachedEncoder:
    """The same by look-up: embeddings wait in host memory, and the encoder is not there."""

    def __init__(self, context: RunContext, encoder: str, weights: Weights) -> None:
        self.device, self.encoder = context.base.device, encoder
        key, known = context.text_keys(encoder, weights), context.plan.placeholders
        wanted = {
            (caption, pooling): key(
                keys.entry(context.spec, encoder, tokens.expand_placeholders(caption, known), pooling)
            )
            for caption in context.captions
            for pooling in (keys.poolings(context.spec) if encoder == "clip" else ("diffusers",))
        }
        own = context.entries(encoder, weights)
        found = context.cache.read(encoder, wanted.values(), lambda: encode_texts(context, encoder, weights, own))
        self.values = {read: found[key] for read, key in wanted.items()}

    def look_up(self, captions: Sequence[str], pooling: str) -> Tensor:
        """In host memory."""
        chosen = pooling if self.encoder == "clip" else "diffusers"
        return torch.stack([self.values[caption, chosen] for caption in captions])

    def embed(self, captions: Sequence[str], pooling: str) -> Tensor:
        return move_module(self.look_up(captions, pooling), self.device)

    def settle(self) -> None:
        """Nothing here changes."""
