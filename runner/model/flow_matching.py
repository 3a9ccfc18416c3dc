"""The flow-matching objective: sampling timesteps, weighting, adding noise, the loss per image.

Shapes: B batch, C latent channels, h x w latent height and width, N image tokens of D numbers (the family's `pack`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runner.model.base import Base

Pack = Callable[[Tensor], Tensor]  # latents [B, C, h, w] -> the transformer's image tokens [B, N, D]


@dataclass(frozen=True)
class Weighting:
    """How timesteps are drawn and losses weighted (SD3 paper, section 3.1).

    scheme: none, sigma_sqrt, logit_normal, mode or cosmap. mean, std: of logit_normal; scale: of mode.
    """

    scheme: str
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29


@dataclass(frozen=True)
class NoisyBatch:
    """Noisy images and what the transformer should predict of them.

    img, target [B, N, D]; sigmas [B, 1, 1], in (0, 1]; timesteps [B], in 0..1 as the transformer takes them.
    """

    img: Tensor
    target: Tensor
    sigmas: Tensor
    timesteps: Tensor


class Flow:
    """Rectified flow as the reference script trains it: x = (1 - sigma) z + sigma eps; the target is eps - z."""

    def __init__(self, base: Base, weighting: Weighting, pack: Pack) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base.folder, subfolder="scheduler")
        self.timesteps: Tensor = scheduler.timesteps  # [1000], descending
        self.sigmas: Tensor = scheduler.sigmas[: len(self.timesteps)]
        self.weighting, self.pack = weighting, pack

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Random indices into the schedule, [count]."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        weighting = self.weighting
        u: Tensor = compute_density_for_timestep_sampling(
            weighting.scheme, count, logit_mean=weighting.mean, logit_std=weighting.std, mode_scale=weighting.scale,
            generator=generator,
        )  # fmt: skip
        return (u * len(self.timesteps)).long().clamp(max=len(self.timesteps) - 1)

    def add_noise(self, latents: Tensor, indices: Tensor, generator: torch.Generator) -> NoisyBatch:
        """latents [B, C, h, w] fp32; indices into the schedule [B]."""
        return add_noise(latents, self.sigmas[indices], self.timesteps[indices] / 1000, generator, self.pack)

    def loss_per_image(self, prediction: Tensor, noised: NoisyBatch) -> Tensor:
        """The weighted squared error of each picture: prediction [B, N, D] -> [B], fp32."""
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        weights: Tensor = compute_loss_weighting_for_sd3(self.weighting.scheme, noised.sigmas)
        return (weights.float() * (prediction.float() - noised.target.float()) ** 2).flatten(1).mean(1)


def add_noise(latents: Tensor, sigmas: Tensor, timesteps: Tensor, generator: torch.Generator, pack: Pack) -> NoisyBatch:
    """latents [B, C, h, w] fp32; sigmas, timesteps [B], in 0..1. The noise is drawn before packing."""
    eps = torch.randn(latents.shape, generator=generator)
    sigmas = sigmas.view(-1, 1, 1)
    z, eps = pack(latents), pack(eps)  # [B, N, D]
    return NoisyBatch((1 - sigmas) * z + sigmas * eps, eps - z, sigmas, timesteps)


def collate(parts: Sequence[NoisyBatch]) -> NoisyBatch:
    """Join batches of one latent size into one."""
    return NoisyBatch(
        torch.cat([part.img for part in parts]),
        torch.cat([part.target for part in parts]),
        torch.cat([part.sigmas for part in parts]),
        torch.cat([part.timesteps for part in parts]),
    )
