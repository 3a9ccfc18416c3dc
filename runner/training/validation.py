"""A look at a run while it trains: the eval loss, and pictures drawn by what is on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from runner.export import pipeline
from runner.model.device import autocast, release
from runner.model.flux1 import loading
from runner.runs import sample_files
from runner.training.context import Desk
from runner.training.objective import FlowObjective


@dataclass(frozen=True)
class Look:
    """eval_loss: the mean over sigmas, None where it is not wanted; by_sigma: each one's; pictures: as many as validation asks
    for, or none."""

    eval_loss: float | None
    by_sigma: dict[float, float]
    pictures: tuple[Image.Image, ...]

    @classmethod
    def at(cls, desk: Desk, objective: FlowObjective, step: int) -> Look:
        by_sigma = objective.evaluate() if desk.spec.validation.loss else {}
        pictures: tuple[Image.Image, ...] = ()
        every = desk.spec.validation.every
        if every and step % every == 0 and step < desk.plan.steps:  # the last ones are drawn from the exports
            try:
                pictures = tuple(draw(desk, objective))
            except Exception as error:
                # Pictures are a courtesy: whatever is wrong with them (memory, most likely) must not end the training.
                desk.say.line(f"no pictures at step {step}: {type(error).__name__}: {error}")
                release(desk.base.device)
        return cls(sum(by_sigma.values()) / len(by_sigma) if by_sigma else None, by_sigma, pictures)


def draw(desk: Desk, objective: FlowObjective) -> list[Image.Image]:
    """The validation pictures with the seeds of the final ones. Nothing is loaded but the VAE and the scheduler."""
    own, base = desk.spec.validation, desk.base
    pipe = _pipeline(desk, objective.transformer)
    objective.transformer.eval()
    try:
        made = []
        for prompt, seed in sample_files.shots(own.prompts, own.count, desk.spec.seed):
            with torch.no_grad():
                text = objective.read([prompt], "diffusers")
            read = pipeline.Read(text.txt.cpu(), text.vec.cpu())
            with autocast(base.device, base.dtype):
                made.append(pipeline.draw(pipe, read, seed, steps=own.steps, size=pipeline.size_of(desk.spec)))
        return made
    finally:
        objective.transformer.train()


def _pipeline(desk: Desk, transformer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(desk.base.folder, subfolder="scheduler")
    pipe = FluxPipeline(
        scheduler=scheduler, vae=loading.load_vae(desk.base), transformer=transformer,
        text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
