"""FLUX.1's latents: encoding by the VAE, scale and shift, packing into patches, position ids.

Shapes: B batch, C = 16 latent channels, h x w latent height and width (an eighth of the picture's). Packed image tokens
are 2 x 2 latent patches: [B, h*w/4, 4*C].
"""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from runner.model.base import Base
from runner.model.latents import LatentScale


def encode_image(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Moments of the latent distribution: pixels [3, H, W] uint8 -> [2*C, h, w] (mean, log-variance), on the CPU."""
    weight = next(vae.parameters())
    scaled = (pixels.to(weight.device, torch.float32) / 255 - 0.5) / 0.5  # -1..1
    with torch.no_grad():
        moments: Tensor = vae.encode(scaled[None].to(weight.dtype)).latent_dist.parameters  # type: ignore[operator]
    return moments[0].cpu()


def latent_scale(base: Base) -> LatentScale:
    """As the VAE's config gives it."""
    config = json.loads((base.folder / "vae" / "config.json").read_text())
    return LatentScale(config["shift_factor"], config["scaling_factor"])


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h*w/4, 4*C]: 2 x 2 patches, channel first within a patch (FluxPipeline's order)."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def image_ids(h: int, w: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Positions of the packed tokens of an h x w latent: [h*w/4, 3] = (0, row, column)."""
    ids = torch.zeros(h // 2, w // 2, 3)
    ids[..., 1] += torch.arange(h // 2)[:, None]
    ids[..., 2] += torch.arange(w // 2)[None, :]
    return ids.reshape(-1, 3).to(device, dtype)
