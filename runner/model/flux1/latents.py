"""FLUX.1's latents: encoding by the VAE, scale and shift, packing into patches, position ids."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runner.model.base import Base, Generator

# ---- latents -------------------------------------------------------------------------------------------------------


def encode_image(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Moments of the latent distribution. pixels [3, H, W] uint8 -> [2*C, h, w] (mean, log-variance)."""
    first = next(vae.parameters())
    scaled = (pixels.to(first.device, torch.float32) / 255 - 0.5) / 0.5
    with torch.no_grad():
        moments: Tensor = vae.encode(scaled[None].to(first.dtype)).latent_dist.parameters  # type: ignore[operator]
    return moments[0].cpu()


@dataclass(frozen=True)
class LatentScale:
    """FLUX's affine map from the VAE's latents to what the transformer sees: (z - shift) * scaling."""

    shift: float
    scaling: float

    @classmethod
    def of(cls, base: Base) -> LatentScale:
        config = json.loads((base.folder / "vae" / "config.json").read_text())
        return cls(config["shift_factor"], config["scaling_factor"])


def draw_latents(moments: Tensor, scale: LatentScale, generator: Generator) -> Tensor:
    """Sample the VAE's posterior. moments [B, 2*C, h, w] -> latents [B, C, h, w], fp32."""
    mean, logvar = moments.float().chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    noise = torch.randn(mean.shape, generator=generator)
    return (mean + std * noise - scale.shift) * scale.scaling


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
