"""Captions to embeddings, exactly as FluxPipeline.encode_prompt does it.

Shapes: B batch, T text tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CLIP, T5 = "clip", "t5"


def token_ids(encoder: str, tokenizer: Any, caption: str, length: int) -> Tensor:
    """[T] of either encoder; a longer caption is cut off. length: T5's T; CLIP's is its tokenizer's."""
    return clip_ids(tokenizer, caption) if encoder == CLIP else t5_ids(tokenizer, caption, length)


def clip_ids(tokenizer: Any, caption: str) -> Tensor:
    """[77] for CLIP-L: BOS, text, EOS, padding."""
    return _ids(tokenizer, caption, tokenizer.model_max_length)


def t5_ids(tokenizer: Any, caption: str, length: int) -> Tensor:
    """[length]: text, EOS, padding."""
    return _ids(tokenizer, caption, length)


def _ids(tokenizer: Any, caption: str, length: int) -> Tensor:
    ids: Tensor = tokenizer(
        [caption], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids[0]


def embed(encoder: str, model: Any, tokenizer: Any, ids: Tensor, pooling: str) -> Tensor:
    """ids [B, T] -> CLIP's pooled vector [B, width] or T5's states [B, T, width]. pooling: "diffusers" or "eos", see
    `clip_pooled`; T5 has none."""
    if encoder == T5:
        return t5_states(model, ids)
    return clip_pooled(model, ids, None if pooling == "diffusers" else int(tokenizer.eos_token_id))


def clip_pooled(encoder: Any, ids: Tensor, eos: int | None) -> Tensor:
    """[B, 77] -> [B, width]: the state at one position of each caption.

    eos None: where the model's config says, as stock diffusers reads it. FLUX.1-dev's config says 2, which transformers
    takes as "the highest id", so that is the first new token wherever there is one. A number: the first position with
    that id, the caption's real end, as ComfyUI reads it.
    """
    out = encoder(ids, output_hidden_states=False)
    if eos is None:
        pooled: Tensor = out.pooler_output
        return pooled
    position = (ids == eos).int().argmax(-1)
    states: Tensor = out.last_hidden_state  # [B, 77, width]
    return states[torch.arange(len(ids), device=ids.device), position]


def t5_states(encoder: Any, ids: Tensor) -> Tensor:
    """[B, T] -> [B, T, width]. Padding is encoded and read like text, as FLUX.1 was trained."""
    states: Tensor = encoder(ids, output_hidden_states=False)[0]
    return states
