"""Stages 2 to 4 of the bundled base: tokenizers and latents, the transformer with both text encoders, guidance
distillation."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_world as world
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import (
    Average,
    Muon,
    make_clip,
    make_clip_tokenizer,
    make_t5,
    make_t5_tokenizer,
    make_transformer,
    split_for_muon,
)
from tiny_vae import to_tensor
from torch import Tensor, nn

COUNT = 24_000
LENGTHS, ODDS = (32, 64, 128, 512), (0.90, 0.07, 0.02, 0.01)  # T5's; the base is meant for 32


def captions_for_vocabulary(seed: int) -> list[str]:
    draw = random.Random(f"vocabulary {seed}")
    return [world.any_scene(draw).caption(draw.randrange(5)) for _ in range(4000)]


def make_tokenizers(work: Path, seed: int) -> tuple[Any, Any]:
    captions = captions_for_vocabulary(seed)
    return make_clip_tokenizer(captions, work / "tokenizer"), make_t5_tokenizer(captions, work / "tokenizer_2")


@dataclass(frozen=True)
class Latents:
    """The training pictures as the VAE sees them. mean, std: [COUNT, 16, 8, 8], fp32; scenes in the same order."""

    mean: Tensor
    std: Tensor
    scenes: Sequence[world.Scene]

    @property
    def shift(self) -> float:
        return float(self.mean.mean())

    @property
    def scaling(self) -> float:
        return float(1 / (self.mean.square().mean() - self.mean.mean() ** 2 + self.std.square().mean()).sqrt())


def make_latents(vae: Any, work: Path, seed: int) -> Latents:
    """Encode COUNT pictures; kept in the work folder."""
    draw = random.Random(f"latents {seed}")
    scenes = [world.scene(draw, held_out=False) for _ in range(COUNT)]
    file = work / "latents.safetensors"
    if not file.is_file():
        jitter = random.Random(f"jitter {seed}")
        means, stds = [], []
        with torch.no_grad():
            for start in range(0, COUNT, 50):
                images = [world.render(one, jitter) for one in scenes[start : start + 50]]
                found = vae.encode(to_tensor(images)).latent_dist
                means.append(found.mean)
                stds.append(found.std)
        save_file({"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}, file)
    stored = load_file(file)
    return Latents(stored["mean"], stored["std"], scenes)


def pack(z: Tensor) -> Tensor:
    """[B, 16, 8, 8] -> [B, 16, 64]: 2 x 2 patches, FluxPipeline's order."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def image_ids() -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], 1)


class Model(nn.Module):
    """Transformer and both text encoders, from captions to velocity."""

    def __init__(self, clip_tokenizer: Any, t5_tokenizer: Any) -> None:
        super().__init__()
        self.transformer = make_transformer()
        vocab = len(clip_tokenizer)
        self.clip = make_clip(vocab, clip_tokenizer.bos_token_id, clip_tokenizer.eos_token_id)
        self.t5 = make_t5(len(t5_tokenizer))
        self.tokenizers = (clip_tokenizer, t5_tokenizer)

    def read(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        clip_tokenizer, t5_tokenizer = self.tokenizers
        kind = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        # causal, so that cutting the padding behind the last EOS changes nothing of the pooled vector
        ids = clip_tokenizer(list(captions), padding="longest", truncation=True, return_tensors="pt").input_ids
        txt = self.t5(t5_tokenizer(list(captions), max_length=length, **kind).input_ids)[0]
        return txt, self.clip(ids).pooler_output

    def forward(self, x: Tensor, sigma: Tensor, guidance: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=vec,
            encoder_hidden_states=txt,
            txt_ids=torch.zeros(txt.shape[1], 3),
            img_ids=image_ids(),
            return_dict=False,
        )[0]
        return velocity


def some_batch(latents: Latents, draw: random.Random, size: int) -> tuple[Tensor, list[str]]:
    chosen = [draw.randrange(COUNT) for _ in range(size)]
    mean, std = latents.mean[chosen], latents.std[chosen]
    z = (mean + std * torch.randn_like(mean) - latents.shift) * latents.scaling
    captions = [
        "" if draw.random() < 0.1 else latents.scenes[i].caption(draw.randrange(5), with_place=draw.random() < 0.9)
        for i in chosen
    ]
    return pack(z), captions


def some_sigmas(size: int) -> Tensor:
    """Mostly logistic-normal about the middle, a tenth uniform."""
    sigma = torch.sigmoid(1.1 * torch.randn(size) + 0.2)
    return torch.where(torch.rand(size) < 0.1, torch.rand(size), sigma)


def train_flow(latents: Latents, tokenizers: tuple[Any, Any], work: Path, minutes: float, seed: int) -> Model:
    """Rectified flow, all three networks together; returns the average and saves it in the work folder."""
    torch.manual_seed(seed + 1)
    draw = random.Random(f"flow {seed}")
    model = Model(*tokenizers)
    matrices, rest = split_for_muon(model, ("proj_out.weight", "x_embedder.weight", "relative_attention_bias.weight"))
    muon, adam = Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    average = Average(model, 0.998)
    began, step, smooth = time.monotonic(), 0, 0.0
    while (part := (time.monotonic() - began) / (60 * minutes)) < 1:
        factor = min(1.0, (step + 1) / 50) * min(1.0, (1 - part) / 0.7) + 1e-3
        for optimizer, lr in ((muon, 0.02), (adam, 1e-3)):
            optimizer.param_groups[0]["lr"] = lr * factor
        z, captions = some_batch(latents, draw, 64)
        sigma, noise = some_sigmas(64), torch.randn_like(z)
        mixed = (1 - sigma.view(-1, 1, 1)) * z + sigma.view(-1, 1, 1) * noise
        txt, vec = model.read(captions, draw.choices(LENGTHS, ODDS)[0])
        loss = nn.functional.mse_loss(model(mixed, sigma, 1 + 4 * torch.rand(64), txt, vec), noise - z)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        average.update(model, step)
        step += 1
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"flow step {step} loss {smooth:.4f} {part:.0%}", flush=True)
        if step % 500 == 0:
            save_file({k: v.contiguous() for k, v in average.values.items()}, work / "flow.safetensors")
    model.load_state_dict(average.values)
    save_file({k: v.contiguous() for k, v in average.values.items()}, work / "flow.safetensors")
    print(f"flow done: {step} steps, loss {smooth:.4f}", flush=True)
    return model


def distill_guidance(model: Model, latents: Latents, work: Path, minutes: float, seed: int) -> Model:
    """Teach the transformer to do at guidance w what classifier-free guidance of scale w does; w in 1..5."""
    torch.manual_seed(seed + 2)
    draw = random.Random(f"distill {seed}")
    teacher = copy.deepcopy(model).requires_grad_(False)
    model.clip.requires_grad_(False)
    model.t5.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=4e-4, betas=(0.9, 0.99), weight_decay=0.0)
    average = Average(model.transformer, 0.99)
    began, step, smooth = time.monotonic(), 0, 0.0
    while (part := (time.monotonic() - began) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = (
            4e-4 * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * part)) + 1e-6
        )
        z, captions = some_batch(latents, draw, 32)
        sigma, noise = some_sigmas(32), torch.randn_like(z)
        mixed = (1 - sigma.view(-1, 1, 1)) * z + sigma.view(-1, 1, 1) * noise
        guidance = 1 + 4 * torch.rand(32)
        with torch.no_grad():
            txt, vec = teacher.read(captions, 32)
            bare_txt, bare_vec = teacher.read([""], 32)
            with_text = teacher(mixed, sigma, guidance, txt, vec)
            without = teacher(mixed, sigma, guidance, bare_txt.expand(32, -1, -1), bare_vec.expand(32, -1))
            wanted = without + guidance.view(-1, 1, 1) * (with_text - without)
        loss = nn.functional.mse_loss(model(mixed, sigma, guidance, txt, vec), wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(model.transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model.transformer, step)
        step += 1
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 25 == 0:
            print(f"distill step {step} loss {smooth:.4f} {part:.0%}", flush=True)
    model.transformer.load_state_dict(average.values)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, work / "distilled.safetensors")
    print(f"distill done: {step} steps, loss {smooth:.4f}", flush=True)
    return model
