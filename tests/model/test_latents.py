"""Latents: packing, and drawing from the VAE's posterior."""

from __future__ import annotations

import torch

from runner.model.flux1.latents import image_ids, pack
from runner.model.latents import LatentScale, draw_latents


def test_packing_is_the_pipelines() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 6, 8)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 8))
    ids = image_ids(6, 8, torch.device("cpu"), torch.float32)
    assert torch.equal(ids, FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))


def test_latents_are_drawn_from_the_vaes_posterior() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(2, 32, 4, 4)
    scale = LatentScale(0.1, 0.3)
    drawn = draw_latents(moments, scale, torch.Generator().manual_seed(3))
    wanted = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(3))
    assert torch.allclose(drawn, (wanted - 0.1) * 0.3, atol=1e-6)
