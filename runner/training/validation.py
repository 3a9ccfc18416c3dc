"""Validation during training: the eval loss, and samples drawn with the models that are on the device."""

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
class ValidationResult:
    """eval_loss: the mean over sigmas, or None if the spec wants none. by_sigma: the loss at each sigma. pictures: one
    for each prompt and seed of the spec, or none."""

    eval_loss: float | None
    by_sigma: dict[float, float]
    pictures: tuple[Image.Image, ...]


def validate(context: RunContext, objective: FlowObjective, step: int) -> ValidationResult:
    """Measure the eval loss, and draw the samples that are due at this step. Training is not affected."""
    by_sigma = objective.evaluate() if context.spec.validation.loss else {}
    pictures: tuple[Image.Image, ...] = ()
    every = context.spec.validation.every
    if every and step % every == 0 and step < context.plan.steps:  # those of the last step are drawn from the exports
        try:
            pictures = tuple(draw_samples(context, objective))
        except Exception as error:
            # A failure here, most likely for lack of memory, must not end the training.
            context.event_log.message(f"no pictures at step {step}: {type(error).__name__}: {error}")
            release(context.base.device)
    return ValidationResult(sum(by_sigma.values()) / len(by_sigma) if by_sigma else None, by_sigma, pictures)


def draw_samples(context: RunContext, objective: FlowObjective) -> list[Image.Image]:
    """The validation's pictures, with the same seeds as the final ones. Only the VAE and the scheduler are loaded; the
    transformer and the text encoders are those in training."""
    validation, base = context.spec.validation, context.base
    pipe = context.family.image_pipeline(base, objective.transformer)
    objective.transformer.eval()
    try:
        pictures = []
        for prompt, seed in sample_files.samples_of(validation.prompts, validation.count, context.spec.seed):
            with torch.no_grad():
                text = objective.embed_prompts([prompt], "diffusers")
            with autocast(base.device, base.dtype):
                size = pipeline.size_of(context.spec)
                pictures.append(pipeline.draw_image(pipe, text.cpu(), seed, steps=validation.steps, size=size))
        return pictures
    finally:
        objective.transformer.train()
