"""The encode phase: everything that learns nothing is computed once, into the cache; and encoders, live or by look-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runner import flux, lora, text, tokens
from runner.basefiles import clip_config, clip_layers
from runner.checkpoint import Weights
from runner.desk import Desk
from runner.device import move, release
from runner.errors import FluxrunError
from runner.lora import LoraShape
from runner.plan import Encode
from runner.spec import Spec

LOADERS = {"clip": flux.load_clip, "t5": flux.load_t5}


def encode(desk: Desk, phase: Encode, weights: Weights) -> None:
    """Fill the cache with what training will read. A model is loaded only if something of it is missing."""
    if phase.latents:
        encode_latents(desk)
    for encoder in phase.encoders:
        encode_captions(desk, encoder, weights)


def encode_latents(desk: Desk) -> None:
    missing = [view for view, key in desk.latent_keys.items() if not desk.cache.has("latents", key)]
    made = {desk.latent_keys[view]: view for view in missing}  # equal pixels are encoded once
    desk.say.line(f"encode: latents of {len(set(desk.latent_keys.values()))} views, {len(made)} to make")
    if not made:
        return
    vae = flux.load_vae(desk.vae_base)
    desk.say.begin_phase("encode latents", 0, len(made), "views")
    for done, (view, pixels) in enumerate(desk.pixels(list(made.values())), 1):
        moments = flux.encode_image(vae, torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        desk.cache.put("latents", desk.latent_keys[view], moments, {"image": view.picture.name})
        desk.say.progress(done, len(made), "views")
        desk.check_stop()
    del vae
    release(desk.base.device)


def encode_captions(desk: Desk, encoder: str, weights: Weights) -> None:
    poolings = desk.poolings if encoder == "clip" else ("diffusers",)
    keys = {
        (caption, pooling): desk.text_key(encoder, caption, pooling, weights)
        for caption in desk.captions
        for pooling in poolings
    }
    missing = [which for which, key in keys.items() if not desk.cache.has(encoder, key)]
    desk.say.line(f"encode: {encoder} embeddings of {len(desk.captions)} captions, {len(missing)} to make")
    if not missing:
        return
    live = LiveEncoder.load(desk, encoder, weights)
    desk.say.begin_phase(f"encode {encoder}", 0, len(missing), "captions")
    for done, (caption, pooling) in enumerate(missing, 1):
        with torch.no_grad():
            value = live.embed([caption], pooling)[0].cpu()
        desk.cache.put(encoder, keys[caption, pooling], value, {})
        desk.say.progress(done, len(missing), "captions")
        desk.check_stop()
    del live
    release(desk.base.device)


def text_lora_shape(spec: Spec, base: flux.Base) -> LoraShape:
    own = spec.text_lora
    assert own is not None
    assert own.alpha is not None  # the spec resolves it
    config = clip_config(base.folder)
    assert config is not None
    return LoraShape(own.rank, own.alpha, 0.0, tuple(clip_layers(config)))


class LiveEncoder:
    """A text encoder on the device with what was learned for it: token rows, or an adapter (CLIP's). Both are trainable
    parameters, frozen unless it was loaded to learn; it knows each caption's ids."""

    def __init__(self, encoder: str, model: nn.Module, tokenizer: Any, std: float) -> None:
        self.encoder, self.model, self.tokenizer, self.std = encoder, model, tokenizer, std
        self.ids: dict[str, Tensor] = {}
        self.rows: nn.Parameter | None = None
        self.first_rows: Tensor | None = None  # what they began as
        self.adapter: Mapping[str, nn.Parameter] = {}

    @classmethod
    def load(
        cls, desk: Desk, encoder: str, weights: Weights, *, learn_rows: bool = False, learn_lora: bool = False
    ) -> LiveEncoder:
        """`weights` are copied in. Where there is nothing to copy yet and it shall learn, it is initialised here, since
        rows are drawn at the table's scale."""
        tokenizer, model = flux.load_tokenizer(desk.base, encoder), LOADERS[encoder](desk.base)
        made = cls(encoder, model, tokenizer, text.table_std(model))
        if encoder in weights.rows or learn_rows:
            counts = [(len(placeholder.pieces), placeholder.initializer) for placeholder in desk.plan.placeholders]
            made.first_rows = text.initial_rows(model, tokenizer, counts, desk.spec.seed, encoder).to(desk.base.device)
            if encoder not in weights.rows:
                for vectors, phrase in counts:
                    pieces = len(tokenizer(phrase, add_special_tokens=False).input_ids) if phrase else 0
                    if pieces > vectors:
                        desk.say.line(
                            f"tokens.initializer {phrase!r} has {pieces} pieces in {encoder}: its first {vectors} are used; "
                            f"tokens.vectors = {pieces} would use all"
                        )
            rows = weights.rows.get(encoder, made.first_rows)
            made.rows = nn.Parameter(rows.clone().to(desk.base.device), requires_grad=learn_rows)
            text.attach_rows(model, tokenizer, desk.pieces, made.rows)
        if encoder == "clip" and (weights.text_lora or learn_lora):
            made.adapter = lora.attach_lora(model, text_lora_shape(desk.spec, desk.base), desk.spec.seed)
            if weights.text_lora:
                lora.set_tensors(made.adapter, weights.text_lora)
            for parameter in made.adapter.values():
                parameter.requires_grad_(learn_lora)
        length = desk.spec.model.max_sequence_length
        for caption in desk.captions:
            written = tokens.expand(caption, desk.plan.placeholders)
            ids = text.clip_ids(tokenizer, written) if encoder == "clip" else text.t5_ids(tokenizer, written, length)
            made.ids[caption] = ids.to(desk.base.device)
        if learn_rows:
            made.check_tokens(desk)
        return made

    def check_tokens(self, desk: Desk) -> None:
        """Rows that no caption brings as far as the encoder would learn nothing: each reads only so many tokens.

        Raises FluxrunError for a token that is cut off everywhere; says so where it is cut off in some captions.
        """
        for placeholder in desk.plan.placeholders:
            wanted = set(self.tokenizer.convert_tokens_to_ids(list(placeholder.pieces)))
            naming = [
                one for one in desk.pictures.captions if tokens.named(one, desk.plan.placeholders) & {placeholder.name}
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
            desk.say.line(told)

    def embed(self, captions: Sequence[str], pooling: str) -> Tensor:
        ids = torch.stack([self.ids[caption] for caption in captions])
        if self.encoder == "t5":
            return text.t5_states(self.model, ids)
        eos = None if pooling == "diffusers" else int(self.tokenizer.eos_token_id)
        return text.clip_pooled(self.model, ids, eos)

    def settle(self) -> None:
        if self.rows is not None and self.rows.requires_grad:
            text.keep_std(self.rows, self.std)


class CachedEncoder:
    """The same by look-up: embeddings wait in host memory, and the encoder is not there."""

    def __init__(self, desk: Desk, encoder: str, weights: Weights) -> None:
        self.device, self.encoder = desk.base.device, encoder
        keys = {
            (caption, pooling): desk.text_key(encoder, caption, pooling, weights)
            for caption in desk.captions
            for pooling in (desk.poolings if encoder == "clip" else ("diffusers",))
        }
        found = desk.cache.read(encoder, keys.values(), lambda: encode_captions(desk, encoder, weights))
        self.values = {read: found[key] for read, key in keys.items()}

    def embed(self, captions: Sequence[str], pooling: str) -> Tensor:
        chosen = pooling if self.encoder == "clip" else "diffusers"
        return move(torch.stack([self.values[caption, chosen] for caption in captions]), self.device)

    def settle(self) -> None:
        """Nothing here changes."""
