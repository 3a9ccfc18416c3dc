"""Latents of any family: drawn from the moments that its VAE gave, and scaled as its transformer reads them.

Shapes: B batch, C latent channels, h x w latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentScale:
    """The affine map from the VAE's latents to what the transformer reads: (z - shift) * scaling."""

    shift: float
    scaling: float


def draw_latents(moments: Tensor, scale: LatentScale, generator: torch.Generator) -> Tensor:
    """Sample the VAE's posterior: moments [B, 2*C, h, w] (mean, log-variance) -> latents [B, C, h, w], fp32."""
    mean, logvar = moments.float().chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    noise = torch.randn(mean.shape, generator=generator)
    return (mean + std * noise - scale.shift) * scale.scaling


def mean_latents(moments: Tensor, scale: LatentScale) -> Tensor:
    """The posterior's mean instead of a sample: moments [B, 2*C, h, w] -> latents [B, C, h, w], fp32."""
    return (moments.float().chunk(2, dim=1)[0] - scale.shift) * scale.scaling
