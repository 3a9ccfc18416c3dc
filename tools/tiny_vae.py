"""Stage 1 of the bundled base: the VAE."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import tiny_world as world
import torch
from tiny_parts import Average, Muon, make_vae, split_for_muon
from torch import Tensor, nn


def to_tensor(images: list[Any]) -> Tensor:
    """PIL pictures -> [B, 3, H, W] in -1..1."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def pictures(draw: random.Random, count: int) -> Tensor:
    """Three captioned pictures to one abstract drawing."""
    images = [
        world.abstract(draw) if draw.random() < 0.25 else world.render(world.scene(draw, held_out=False), draw)
        for _ in range(count)
    ]
    return to_tensor(images)


def edges(x: Tensor) -> Tensor:
    """Differences to the right and lower neighbour, [B, 2 * C, H - 1, W - 1]."""
    return torch.cat([x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1]], 1)


def reconstruction_loss(made: Tensor, wanted: Tensor) -> Tensor:
    flat = nn.functional.l1_loss(made, wanted) + 2 * nn.functional.mse_loss(made, wanted)
    return flat + 0.5 * nn.functional.l1_loss(edges(made), edges(wanted))


def psnr(vae: Any, images: Tensor) -> float:
    """Decibels, pictures in 0..1, encoded to the mean and back."""
    with torch.no_grad():
        made = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    return float(-10 * torch.log10(((made - images) / 2).square().mean()))


def train_vae(work: Path, minutes: float, seed: int) -> Any:
    """Train for `minutes`; the schedule follows the clock, so a slower machine takes fewer steps. Returns the
    average."""
    torch.manual_seed(seed)
    draw = random.Random(f"vae {seed}")
    vae = make_vae()
    with torch.no_grad():  # start nearly deterministic: log-variance about -5
        vae.encoder.conv_out.bias[16:] = -5.0
        vae.encoder.conv_out.weight[16:] *= 0.1
    vae = vae.to(memory_format=torch.channels_last)
    matrices, rest = split_for_muon(vae, ("conv_in.weight", "conv_out.weight"))
    muon, adam = Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    average = Average(vae, 0.998)
    held = pictures(random.Random("held-out"), 64)
    began, step = time.monotonic(), 0
    while (part := (time.monotonic() - began) / (60 * minutes)) < 1:
        factor = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * part)) + 1e-3
        for optimizer, lr in ((muon, 0.02), (adam, 3e-3)):
            optimizer.param_groups[0]["lr"] = lr * factor
        x = pictures(draw, 16).contiguous(memory_format=torch.channels_last)
        latents = vae.encode(x).latent_dist
        z = latents.mean + latents.std * torch.randn_like(latents.mean)
        loss = reconstruction_loss(vae.decode(z).sample, x) + 1e-4 * latents.kl().mean() / 64
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        average.update(vae, step)
        step += 1
        if step % 100 == 0:
            print(f"vae step {step} loss {loss.item():.4f} psnr {psnr(vae, held):.2f} {part:.0%}", flush=True)
    vae.load_state_dict(average.values)
    vae = vae.to(memory_format=torch.contiguous_format)
    print(f"vae done: {step} steps, psnr {psnr(vae, held):.2f}", flush=True)
    vae.save_pretrained(work / "vae")
    return vae
