"""The flow-matching objective: sampling timesteps, weighting, adding noise, the loss per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runner.model.base import Base, Generator
from runner.model.flux1.latents import pack

# ---- flow matching -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighting:
    """How timesteps are drawn and weighed. scheme: none, sigma_sqrt, logit_normal, mode, cosmap (SD3 paper, sec. 3.1)."""

    scheme: str
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29


@dataclass(frozen=True)
class NoisyBatch:
    """One micro-batch on its way through the transformer. sigmas [B, 1, 1] in (0, 1]; the rest packed [B, N, 4*C]."""

    img: Tensor
    target: Tensor
    sigmas: Tensor
    timesteps: Tensor  # [B], in 0..1 as the transformer takes them


class Flow:
    """Rectified flow as the reference trains it: x = (1 - sigma) z + sigma eps, target eps - z."""

    def __init__(self, base: Base, weighting: Weighting) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base.folder, subfolder="scheduler")
        self.timesteps: Tensor = scheduler.timesteps  # [1000], descending
        self.sigmas: Tensor = scheduler.sigmas[: len(self.timesteps)]
        self.weighting = weighting

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Indices into the schedule, [count]."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        own = self.weighting
        u: Tensor = compute_density_for_timestep_sampling(
            own.scheme, count, logit_mean=own.mean, logit_std=own.std, mode_scale=own.scale, generator=generator
        )
        return (u * len(self.timesteps)).long().clamp(max=len(self.timesteps) - 1)

    def noise(self, latents: Tensor, indices: Tensor, generator: Generator) -> NoisyBatch:
        """latents [B, C, h, w] fp32, indices [B]."""
        return add_noise(latents, self.sigmas[indices], self.timesteps[indices] / 1000, generator)

    def errors(self, prediction: Tensor, noised: NoisyBatch) -> Tensor:
        """Weighted squared error, a mean per picture; [B], fp32."""
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        weights: Tensor = compute_loss_weighting_for_sd3(self.weighting.scheme, noised.sigmas)
        return (weights.float() * (prediction.float() - noised.target.float()) ** 2).flatten(1).mean(1)


def add_noise(latents: Tensor, sigmas: Tensor, timesteps: Tensor, generator: Generator) -> NoisyBatch:
    """latents [B, C, h, w] fp32; sigmas, timesteps [B], in 0..1."""
    eps = torch.randn(latents.shape, generator=generator)
    part = sigmas.view(-1, 1, 1)
    z, eps = pack(latents), pack(eps)
    return NoisyBatch((1 - part) * z + part * eps, eps - z, part, timesteps)


def collate(parts: Sequence[NoisyBatch]) -> NoisyBatch:
    """Several micro-batches of one size as one."""
    return NoisyBatch(
        torch.cat([part.img for part in parts]),
        torch.cat([part.target for part in parts]),
        torch.cat([part.sigmas for part in parts]),
        torch.cat([part.timesteps for part in parts]),
    )
