"""The encode phase: everything that learns nothing is computed once, into the cache; and encoders, live or by look-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from runner import flux, text, tokens
from runner.desk import Desk
from runner.device import move, release
from runner.plan import Encode

LOADERS = {"clip": flux.load_clip, "t5": flux.load_t5}


def encode(desk: Desk, phase: Encode, rows: Mapping[str, Tensor]) -> None:
    """Fill the cache with what training will read. A model is loaded only if something of it is missing."""
    if phase.latents:
        encode_latents(desk)
    for encoder in phase.encoders:
        _encode_captions(desk, encoder, rows.get(encoder))


def encode_latents(desk: Desk) -> None:
    missing = {index for index, key in enumerate(desk.latent_keys) if not desk.cache.has("latents", key)}
    desk.say.line(f"encode: latents of {len(desk.latent_keys)} images, {len(missing)} to make")
    if not missing:
        return
    vae = flux.load_vae(desk.base)
    desk.say.begin_phase("encode latents", 0, len(missing), "images")
    made = 0
    for index, pixels in enumerate(desk.all_pixels()):
        if index not in missing:
            continue
        moments = flux.encode_image(vae, torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        desk.cache.put("latents", desk.latent_keys[index], moments, {"image": desk.pictures.items[index].name})
        desk.say.progress(made := made + 1, len(missing), "images")
        desk.check_stop()
    del vae
    release(desk.base.device)


def _encode_captions(desk: Desk, encoder: str, rows: Tensor | None) -> None:
    keys = {caption: desk.text_key(encoder, caption, rows) for caption in desk.pictures.captions}
    missing = [caption for caption, key in keys.items() if not desk.cache.has(encoder, key)]
    desk.say.line(f"encode: {encoder} embeddings of {len(keys)} captions, {len(missing)} to make")
    if not missing:
        return
    live = LiveEncoder.load(desk, encoder, None if rows is None else nn.Parameter(rows.clone(), requires_grad=False))
    desk.say.begin_phase(f"encode {encoder}", 0, len(missing), "captions")
    for done, caption in enumerate(missing, 1):
        with torch.no_grad():
            value = live.embed([caption])[0].cpu()
        desk.cache.put(encoder, keys[caption], value, {})
        desk.say.progress(done, len(missing), "captions")
        desk.check_stop()
    del live
    release(desk.base.device)


class LiveEncoder:
    """A text encoder on the device, with learned rows if it has any; knows each caption's ids."""

    def __init__(
        self, encoder: str, model: nn.Module, ids: Mapping[str, Tensor], rows: nn.Parameter | None, std: float
    ) -> None:
        self.encoder = encoder
        self.model = model
        self.ids = ids
        self.rows = rows
        self.std = std

    @classmethod
    def load(cls, desk: Desk, encoder: str, rows: nn.Parameter | None, learn: bool = False) -> LiveEncoder:
        """`rows` None with `learn`: rows are initialised here, since they are drawn at the table's scale."""
        tokenizer, model = flux.load_tokenizer(desk.base, encoder), LOADERS[encoder](desk.base)
        std = text.table_std(model)
        if rows is None and learn:
            counts = [(len(placeholder.pieces), placeholder.initializer) for placeholder in desk.plan.placeholders]
            rows = nn.Parameter(text.initial_rows(model, tokenizer, counts, desk.spec.seed, encoder))
        if rows is not None:
            rows.data = rows.data.to(desk.base.device)
            text.attach_rows(model, tokenizer, desk.pieces, rows)
        expanded = {caption: tokens.expand(caption, desk.plan.placeholders) for caption in desk.pictures.captions}
        length = desk.spec.model.max_sequence_length
        ids = {
            caption: text.clip_ids(tokenizer, read) if encoder == "clip" else text.t5_ids(tokenizer, read, length)
            for caption, read in expanded.items()
        }
        return cls(encoder, model, {caption: value.to(desk.base.device) for caption, value in ids.items()}, rows, std)

    def embed(self, captions: Sequence[str]) -> Tensor:
        ids = torch.stack([self.ids[caption] for caption in captions])
        return text.clip_pooled(self.model, ids) if self.encoder == "clip" else text.t5_states(self.model, ids)

    def settle(self) -> None:
        if self.rows is not None and self.rows.requires_grad:
            text.keep_std(self.rows, self.std)


class CachedEncoder:
    """The same by look-up: embeddings wait in host memory, and the encoder is not there."""

    def __init__(self, desk: Desk, encoder: str, rows: Tensor | None) -> None:
        self.device = desk.base.device
        self.values: dict[str, Tensor] = {}
        for caption in desk.pictures.captions:
            value = desk.cache.get(encoder, desk.text_key(encoder, caption, rows))
            if value is None:  # damaged or pruned since it was made
                _encode_captions(desk, encoder, rows)
                value = desk.cache.get(encoder, desk.text_key(encoder, caption, rows))
            assert value is not None
            self.values[caption] = value

    def embed(self, captions: Sequence[str]) -> Tensor:
        return move(torch.stack([self.values[caption] for caption in captions]), self.device)
