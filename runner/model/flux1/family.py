"""FLUX.1 as a `ModelFamily`: every method is one function of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runner.base import architectures
from runner.model.base import Base
from runner.model.family import Predict, PromptEmbeds, TrainSettings
from runner.model.flux1 import latents as flux_latents
from runner.model.flux1 import layer_names, loading, text_encoders
from runner.model.flux1 import transformer as flux_transformer
from runner.model.flux1.pipeline import Flux1ImagePipeline, Flux1TextPipeline
from runner.model.latents import LatentScale


class Flux1Family:
    """FLUX.1-dev, -schnell, -Krea-dev and their fine-tunes. Encoders: "clip" (CLIP-L, pooled) and "t5" (T5-XXL, by
    token)."""

    architecture = architectures.FLUX1
    layer_names = layer_names.FLUX1

    def load_transformer(self, base: Base) -> nn.Module:
        return loading.load_transformer(base)

    def load_vae(self, base: Base) -> nn.Module:
        return loading.load_vae(base)

    def load_encoder(self, base: Base, encoder: str) -> nn.Module:
        return loading.load_encoder(base, encoder)

    def load_tokenizer(self, base: Base, encoder: str) -> Any:
        return loading.load_tokenizer(base, encoder)

    def token_ids(self, encoder: str, tokenizer: Any, caption: str, length: int) -> Tensor:
        return text_encoders.token_ids(encoder, tokenizer, caption, length)

    def embed(self, encoder: str, model: nn.Module, tokenizer: Any, ids: Tensor, pooling: str) -> Tensor:
        return text_encoders.embed(encoder, model, tokenizer, ids, pooling)

    def prompt_embeds(self, embeddings: Mapping[str, Tensor]) -> PromptEmbeds:
        return PromptEmbeds(txt=embeddings["t5"], vec=embeddings["clip"])

    def recompute_encoder(self, encoder: str, model: nn.Module, *, save_activations: bool, projections: bool) -> None:
        if encoder == "t5":
            from runner.model.flux1.recompute_t5 import enable_recompute

            enable_recompute(model, save_activations=save_activations, recompute_projections=projections)

    def encode_image(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        return flux_latents.encode_image(vae, pixels)

    def latent_scale(self, base: Base) -> LatentScale:
        return flux_latents.latent_scale(base)

    def pack(self, latents: Tensor) -> Tensor:
        return flux_latents.pack(latents)

    def prepare_training(self, transformer: nn.Module, settings: TrainSettings) -> None:
        flux_transformer.prepare_training(transformer, settings)

    def end_training(self, transformer: nn.Module) -> None:
        flux_transformer.end_training(transformer)

    def predictor(self, transformer: nn.Module, guidance: float, device: torch.device, dtype: torch.dtype) -> Predict:
        return flux_transformer.predictor(transformer, guidance, device, dtype)

    def text_pipeline(self, base: Base, *, with_large: bool = True) -> Flux1TextPipeline:
        return Flux1TextPipeline.load(base, with_t5=with_large)

    def image_pipeline(self, base: Base, transformer: Any, *, with_vae: bool = True) -> Flux1ImagePipeline:
        return Flux1ImagePipeline.load(base, transformer, with_vae=with_vae)
