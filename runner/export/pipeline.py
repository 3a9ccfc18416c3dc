"""Pictures from exported files, drawn by the stock library: what a user of the exports will get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from runner.data import tokens
from runner.model.base import Base
from runner.model.device import release
from runner.model.families import family_of
from runner.model.family import ImagePipeline, PromptEmbeds, TextPipeline
from runner.spec.schema import Spec

GUIDANCE = 3.5  # FluxPipeline's default; a training guidance of 1 is still sampled at this


@dataclass(frozen=True)
class ExportedFiles:
    """The files of one run that a pipeline loads; None where the run has no such file."""

    lora: Path | None
    embeddings: Path | None
    placeholders: tuple[tokens.Placeholder, ...]


def size_of(spec: Spec) -> int:
    """The side of a run's pictures in pixels."""
    assert spec.validation.size is not None  # the spec resolves it
    return spec.validation.size


def load_embeddings(pipe: TextPipeline, file: Path, placeholders: Sequence[tokens.Placeholder]) -> None:
    """The learned rows of all placeholders."""
    pipe.load_embeddings(file, tokens.vocabulary_entries(placeholders))


def draw_image(
    pipe: ImagePipeline, prompt: PromptEmbeds, seed: int, *, steps: int, size: int, guidance: float = GUIDANCE,
    scale: float = 1.0,
) -> Image.Image:  # fmt: skip
    """One picture of size x size pixels."""
    [image] = pipe.draw(prompt, [seed], steps=steps, size=size, guidance=guidance, scale=scale)
    return image


def draw_samples(
    base: Base, exported: ExportedFiles | None, prompts: Sequence[tuple[str, int]], *,
    length: int, steps: int, size: int, guidance: float = GUIDANCE, scale: float = 1.0,
) -> list[Image.Image]:  # fmt: skip
    """(prompt, seed) each -> pictures. Text encoders and transformer are on the device one after the other."""
    family = family_of(base)
    embeds = _read_prompts(family.text_pipeline(base), exported, [prompt for prompt, _ in prompts], length, scale)
    release(base.device)
    pipe = family.image_pipeline(base, family.load_transformer(base))
    if exported is not None and exported.lora is not None:
        pipe.load_lora(exported.lora)
    return [
        draw_image(pipe, prompt, seed, steps=steps, size=size, guidance=guidance, scale=scale)
        for prompt, (_, seed) in zip(embeds, prompts, strict=True)
    ]


def _read_prompts(
    pipe: TextPipeline, exported: ExportedFiles | None, prompts: Sequence[str], length: int, scale: float
) -> list[PromptEmbeds]:
    """With the exported rows and text LoRA loaded, if there are any."""
    if exported is not None and exported.embeddings is not None:
        load_embeddings(pipe, exported.embeddings, exported.placeholders)
    if exported is not None and exported.lora is not None:
        pipe.load_lora(exported.lora)
    placeholders = exported.placeholders if exported else ()
    expanded = [tokens.expand_placeholders(prompt, placeholders) for prompt in prompts]
    return pipe.read(expanded, length, scale=scale)
