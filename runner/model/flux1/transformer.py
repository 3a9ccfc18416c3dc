"""Calling FLUX.1's transformer: blocks, attention backend, gradient checkpointing, rotary embeddings, prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runner.base import layers
from runner.core.errors import FluxrunError
from runner.model.flow_matching import NoisyBatch
from runner.model.flux1.latents import image_ids
from runner.spec.attention import ON_A_GPU


def blocks_of(transformer: Any) -> list[nn.Module]:
    """In the order in which they run."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def set_attention(transformer: Any, backend: str) -> None:
    """Choose the transformer's attention by diffusers' name. Raises FluxrunError where this machine cannot do it."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if backend in ON_A_GPU and transformer.device.type != "cuda":
        raise FluxrunError(f"model.attention: {backend} needs an NVIDIA GPU (found {transformer.device}); use native")
    try:
        transformer.set_attention_backend(backend)
    except RuntimeError as error:
        raise FluxrunError(f"model.attention: {backend} cannot be used here ({error}); or use native") from error
    finally:  # diffusers makes it everyone's: the next run in this process, and pictures, have not asked for it
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def run_twice(transformer: Any, every: int) -> list[nn.Module]:
    """The blocks that gradient checkpointing of every n-th (0: of none) is for."""
    blocks = blocks_of(transformer)
    return [blocks[place] for place in layers.run_twice(len(blocks), every)]


def enable_gradient_checkpointing(transformer: Any, blocks: Collection[nn.Module]) -> None:
    """Gradient checkpointing of these: their activations are made again in the backward pass."""
    chosen = {id(block) for block in blocks}

    def call(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False) if id(block) in chosen else block(*inputs)

    transformer.enable_gradient_checkpointing(call)


@dataclass(frozen=True)
class PromptEmbeds:
    """What the transformer reads. txt [B, T, t5 width], vec [B, clip width]."""

    txt: Tensor
    vec: Tensor


Predict = Callable[[NoisyBatch, PromptEmbeds, int, int], Tensor]


def predictor(transformer: nn.Module, guidance: float, device: torch.device, dtype: torch.dtype) -> Predict:
    """The transformer's velocity prediction: (noised, text, latent height, latent width) -> [B, N, 4*C].

    Bases without a guidance embedding (FLUX.1-schnell) are told no guidance. What only depends on the shape is made once.
    """
    guided = bool(transformer.config.guidance_embeds)  # type: ignore[union-attr]

    @functools.cache
    def ids(length: int, h: int, w: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(length, 3, device=device, dtype=dtype), image_ids(h, w, device, dtype)

    @functools.cache
    def told(count: int) -> Tensor | None:
        return torch.full((count,), guidance, device=device) if guided else None

    def predict(noised: NoisyBatch, text: PromptEmbeds, h: int, w: int) -> Tensor:
        count, length = text.txt.shape[:2]
        txt_ids, img_ids = ids(length, h, w)
        with rotary_of(transformer, (length, h, w)):
            out: Tensor = transformer(
                hidden_states=noised.img.to(dtype),
                timestep=noised.timesteps,
                guidance=told(count),
                pooled_projections=text.vec,
                encoder_hidden_states=text.txt,
                txt_ids=txt_ids,
                img_ids=img_ids,
                return_dict=False,
            )[0]
        return out

    return predict


class Rotary(nn.Module):
    """The transformer's own position embedding, which it computes in every forward pass, kept per shape while the caller
    says which shape that is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.shape: tuple[int, int, int] | None = None
        self.tables: dict[tuple[int, int, int], Any] = {}

    def forward(self, ids: Tensor) -> Any:
        if self.shape is None:  # stock diffusers draws
            return self.inner(ids)
        if self.shape not in self.tables:
            self.tables[self.shape] = self.inner(ids)
        return self.tables[self.shape]


def forget_shapes(transformer: nn.Module) -> None:
    """Drop what was kept per shape."""
    assert isinstance(transformer.pos_embed, Rotary)
    transformer.pos_embed.tables.clear()


@contextmanager
def rotary_of(transformer: nn.Module, shape: tuple[int, int, int]) -> Iterator[None]:
    """Within, the ids are those of this (text length, latent height, latent width)."""
    rotary = transformer.pos_embed
    if not isinstance(rotary, Rotary):  # a transformer that was made elsewhere
        yield
        return
    rotary.shape = shape
    try:
        yield
    finally:
        rotary.shape = None
