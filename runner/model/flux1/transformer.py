"""FLUX.1's transformer in training: its setup, and the function that predicts the velocity."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runner.base import layers
from runner.core.errors import FluxrunError
from runner.model.family import Predict, PromptEmbeds, TrainSettings
from runner.model.flow_matching import NoisyBatch
from runner.model.flux1.latents import image_ids
from runner.spec.attention import GPU_ONLY


def blocks_of(transformer: Any) -> list[nn.Module]:
    """Double blocks, then single blocks: the order in which they run."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def prepare_training(transformer: Any, settings: TrainSettings) -> None:
    """Choose the attention, and what is computed again in the backward pass. Raises FluxrunError where this machine has
    no such attention."""
    set_attention(transformer, settings.attention)
    recompute = settings.recompute
    checkpointed = [] if recompute == "selective" else checkpointed_blocks(transformer, recompute)
    if settings.offloaded:  # each block recomputes itself
        checkpointed = blocks_of(transformer)
    elif checkpointed:
        enable_gradient_checkpointing(transformer, checkpointed)
    if not settings.compiled:  # the compiler decides for itself what to recompute
        from runner.model.flux1.recompute import enable_recompute

        enable_recompute(transformer, checkpointed=checkpointed, recompute_projections=recompute == "selective")


def end_training(transformer: Any) -> None:
    """Undo `prepare_training`, and drop the rotary tables."""
    from runner.model.flux1.recompute import disable_recompute

    disable_recompute(transformer)
    clear_rotary_tables(transformer)
    set_attention(transformer, "native")
    transformer.disable_gradient_checkpointing()


def set_attention(transformer: Any, backend: str) -> None:
    """Choose the transformer's attention, by diffusers' name of the backend. Raises FluxrunError where this machine
    lacks it."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if backend in GPU_ONLY and transformer.device.type != "cuda":
        raise FluxrunError(f"model.attention: {backend} needs an NVIDIA GPU (found {transformer.device}); use native")
    try:
        transformer.set_attention_backend(backend)
    except RuntimeError as error:
        raise FluxrunError(f"model.attention: {backend} cannot be used here ({error}); or use native") from error
    finally:  # diffusers sets it for the whole process; the next run here, and pictures, have not asked for it
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def checkpointed_blocks(transformer: Any, every: int) -> list[nn.Module]:
    """The blocks that gradient checkpointing of every n-th block (0: of none) runs again."""
    blocks = blocks_of(transformer)
    return [blocks[index] for index in layers.checkpointed_blocks(len(blocks), every)]


def enable_gradient_checkpointing(transformer: Any, blocks: Collection[nn.Module]) -> None:
    """Run these blocks again in the backward pass instead of keeping their activations."""
    chosen = {id(block) for block in blocks}

    def call(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False) if id(block) in chosen else block(*inputs)

    transformer.enable_gradient_checkpointing(call)


def predictor(transformer: nn.Module, guidance: float, device: torch.device, dtype: torch.dtype) -> Predict:
    """The transformer's velocity prediction: (noisy images, prompts, latent height, latent width) -> [B, N, 4*C].

    Bases without a guidance embedding (FLUX.1-schnell) get no guidance. Tensors that depend on the shape alone are
    kept.
    """
    guided = bool(transformer.config.guidance_embeds)  # type: ignore[union-attr]

    @functools.cache
    def ids(length: int, h: int, w: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(length, 3, device=device, dtype=dtype), image_ids(h, w, device, dtype)

    @functools.cache
    def guidance_of(batch: int) -> Tensor | None:
        return torch.full((batch,), guidance, device=device) if guided else None

    def predict(noised: NoisyBatch, text: PromptEmbeds, h: int, w: int) -> Tensor:
        batch, length = text.txt.shape[:2]
        txt_ids, img_ids = ids(length, h, w)
        with rotary_tables_for(transformer, (length, h, w)):
            out: Tensor = transformer(
                hidden_states=noised.img.to(dtype),
                timestep=noised.timesteps,
                guidance=guidance_of(batch),
                pooled_projections=text.vec,
                encoder_hidden_states=text.txt,
                txt_ids=txt_ids,
                img_ids=img_ids,
                return_dict=False,
            )[0]
        return out

    return predict


class CachedRotary(nn.Module):
    """The transformer's position embedding, kept per shape while `rotary_tables_for` says which shape the ids have. The
    transformer itself computes it in every forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.shape: tuple[int, int, int] | None = None
        self.tables: dict[tuple[int, int, int], Any] = {}

    def forward(self, ids: Tensor) -> Any:
        if self.shape is None:  # stock diffusers is drawing
            return self.inner(ids)
        if self.shape not in self.tables:
            self.tables[self.shape] = self.inner(ids)
        return self.tables[self.shape]


def clear_rotary_tables(transformer: nn.Module) -> None:
    """Drop the tables of every shape."""
    assert isinstance(transformer.pos_embed, CachedRotary)
    transformer.pos_embed.tables.clear()


@contextmanager
def rotary_tables_for(transformer: nn.Module, shape: tuple[int, int, int]) -> Iterator[None]:
    """Within the block, the ids are those of this shape: (text length, latent height, latent width)."""
    rotary = transformer.pos_embed
    if not isinstance(rotary, CachedRotary):  # a transformer that `load_transformer` has not loaded
        yield
        return
    rotary.shape = shape
    try:
        yield
    finally:
        rotary.shape = None
