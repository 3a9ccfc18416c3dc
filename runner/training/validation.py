"""A look at a run while it trains: the eval loss, and pictures drawn by what is on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from runner.export import pipeline
from runner.model.device import autocast, release
from runner.runs import sample_files
from runner.training.context import RunContext
from runner.training.objective import FlowObjective


@dataclass(frozen=True)
class Validator:
    """eval_loss: the mean over sigmas, None where it is not wanted; by_sigma: each one's; pictures: as many as validation asks
    for, or none."""

    eval_loss: float | None
    by_sigma: dict[float, float]
    pictures: tuple[Image.Image, ...]

    @classmethod
    def at(cls, context: RunContext, objective: FlowObjective, step: int) -> Validator:
        by_sigma = objective.evaluate() if context.spec.validation.loss else {}
        pictures: tuple[Image.Image, ...] = ()
        every = context.spec.validation.every
        if every and step % every == 0 and step < context.plan.steps:  # the last ones are drawn from the exports
            try:
                pictures = tuple(draw_samples(context, objective))
            except Exception as error:
                # Pictures are a courtesy: whatever is wrong with them (memory, most likely) must not end the training.
                context.event_log.line(f"no pictures at step {step}: {type(error).__name__}: {error}")
                release(context.base.device)
        return cls(sum(by_sigma.values()) / len(by_sigma) if by_sigma else None, by_sigma, pictures)


def draw_samples(context: RunContext, objective: FlowObjective) -> list[Image.Image]:
    """The validation pictures with the seeds of the final ones. Nothing is loaded but the VAE and the scheduler."""
    own, base = context.spec.validation, context.base
    pipe = context.family.image_pipeline(base, objective.transformer)
    objective.transformer.eval()
    try:
        made = []
        for prompt, seed in sample_files.samples_of(own.prompts, own.count, context.spec.seed):
            with torch.no_grad():
                text = objective.read([prompt], "diffusers")
            with autocast(base.device, base.dtype):
                made.append(
                    pipeline.draw_image(pipe, text.cpu(), seed, steps=own.steps, size=pipeline.size_of(context.spec))
                )
        return made
    finally:
        objective.transformer.train()
