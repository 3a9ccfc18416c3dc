"""The flow-matching loss, its timesteps and weights, against diffusers' helpers and the reference's formula."""

from __future__ import annotations

import math

import pytest
import torch

from runner.model import flow_matching
from runner.model.family import PromptEmbeds
from runner.model.flux1 import loading
from runner.model.flux1.latents import image_ids, pack
from runner.model.flux1.transformer import predictor
from tests.support.bases import BASE


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_the_loss_is_the_references_formula(scheme: str) -> None:
    """Written here from the definition: x = (1 - s) z + s e, target e - z, weighted mean square."""
    flow = flow_matching.Flow(BASE, flow_matching.Weighting(scheme), pack)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 16, 8, 8, generator=generator)
    indices = flow.sample_timesteps(3, generator)
    noised = flow.add_noise(latents, indices, torch.Generator().manual_seed(5))
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    transformer = loading.load_transformer(BASE)
    read = PromptEmbeds(torch.randn(3, 16, 96), torch.randn(3, 64))
    with torch.no_grad():
        predicted = predictor(transformer, 3.5, BASE.device, BASE.dtype)(noised, read, 8, 8)
        loss = flow.loss_per_image(predicted, noised).mean()

    t = 1000 - indices  # the schedule is 1000, 999, .. 1, unshifted since FLUX shifts by resolution at inference only
    sigma = (t / 1000).view(-1, 1, 1, 1)
    mixed = (1 - sigma) * latents + sigma * eps
    assert torch.allclose(pack(mixed), noised.img, atol=1e-6)
    packed = transformer(
        hidden_states=pack(mixed), timestep=t / 1000, guidance=torch.full((3,), 3.5), pooled_projections=read.vec,
        encoder_hidden_states=read.txt, txt_ids=torch.zeros(16, 3), img_ids=image_ids(8, 8, BASE.device, torch.float32),
    ).sample  # fmt: skip
    unpacked = packed.view(3, 4, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 16, 8, 8)
    weight = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))}.get(
        scheme, torch.ones_like(sigma)
    )
    wanted = (weight * (unpacked - (eps - latents)) ** 2).reshape(3, -1).mean(1).mean()
    assert abs(float(wanted.detach()) - float(loss)) <= 1e-6 * max(1.0, float(loss))


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_timesteps_and_weights_are_those_of_diffusers_helpers(scheme: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

    flow = flow_matching.Flow(BASE, flow_matching.Weighting(scheme, mean=0.4, std=0.6, scale=0.8), pack)
    drawn = flow.sample_timesteps(2000, torch.Generator().manual_seed(7))
    u = compute_density_for_timestep_sampling(
        scheme, 2000, logit_mean=0.4, logit_std=0.6, mode_scale=0.8, generator=torch.Generator().manual_seed(7)
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(BASE.folder, subfolder="scheduler")
    assert torch.equal(flow.timesteps[drawn], scheduler.timesteps[(u * 1000).long()])
    plain = torch.rand(2000, generator=torch.Generator().manual_seed(7))
    shaped = scheme in ("logit_normal", "mode")
    assert torch.equal(drawn, (plain * 1000).long()) != shaped  # its own numbers count where it has any

    noised = flow.add_noise(torch.zeros(2000, 16, 2, 2), drawn, torch.Generator().manual_seed(1))
    weights = compute_loss_weighting_for_sd3(scheme, scheduler.sigmas[drawn])
    assert torch.allclose(flow.loss_per_image(noised.target + 1, noised), weights.float(), rtol=1e-4)
