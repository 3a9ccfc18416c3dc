"""Pictures by stock diffusers, from exported files: what a user of the exports will get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from runner.data import tokens
from runner.model.base import Base
from runner.model.device import release
from runner.model.flux1 import loading
from runner.spec.schema import Spec

GUIDANCE = 3.5  # FluxPipeline's default; a training guidance of 1 is still sampled at this


@dataclass(frozen=True)
class ExportedFiles:
    """The files of one run that a pipeline loads; None where the run has no such file."""

    lora: Path | None
    embeddings: Path | None
    placeholders: tuple[tokens.Placeholder, ...]


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as the transformer takes it, on the CPU: txt [1, T, width], vec [1, width]."""

    txt: Tensor
    vec: Tensor


def load_embeddings(pipe: Any, file: Path, placeholders: Sequence[tokens.Placeholder]) -> None:
    """As the model card tells a user to: each encoder gets the rows that were learned for it."""
    pieces = tokens.vocabulary_entries(placeholders)
    rows = load_file(file)
    pipe.load_textual_inversion(rows["clip_l"], token=pieces, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    if "t5" in rows:
        pipe.load_textual_inversion(
            rows["t5"], token=pieces, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )


def text_pipeline(base: Base, exported: ExportedFiles | None, *, with_t5: bool = True) -> Any:
    """A FluxPipeline of the two encoders alone, with the learned tokens and the CLIP encoder's LoRA."""
    from diffusers import FluxPipeline

    without = {"text_encoder_2": loading.load_t5(base)} if with_t5 else {"text_encoder_2": None, "tokenizer_2": None}
    pipe = FluxPipeline.from_pretrained(
        base.folder, transformer=None, vae=None, **without, dtype=base.dtype, variant=base.variant, use_safetensors=True
    )
    pipe.text_encoder.to(base.device)  # and not the pipeline: blocks that wait in host memory stay there
    if exported is not None and exported.embeddings is not None:
        load_embeddings(pipe, exported.embeddings, exported.placeholders)
    if exported is not None and exported.lora is not None:
        load_text_lora(pipe, exported.lora)
    return pipe


def load_text_lora(pipe: Any, file: Path) -> None:
    """The text encoder's part of a LoRA file, if it has one; `load_lora_weights` wants a transformer in the pipeline."""
    state, _, metadata = pipe.lora_state_dict(
        file.parent, weight_name=file.name, return_alphas=True, return_lora_metadata=True
    )
    if any(name.startswith("text_encoder.") for name in state):
        pipe.load_lora_into_text_encoder(
            state, None, pipe.text_encoder, prefix="text_encoder", metadata=metadata, _pipeline=pipe
        )


def read_prompts(
    pipe: Any, prompts: Sequence[str], length: int, scale: float = 1.0, texts: Sequence[Tensor] | None = None
) -> list[EncodedPrompt]:
    """`scale`: strength of the CLIP encoder's LoRA, where it has one; `texts`: what T5 makes of the prompts, each
    [T, width], for a pipeline without it."""
    more = {} if scale == 1.0 else {"lora_scale": scale}
    if texts is not None:
        with torch.no_grad():
            vectors = [
                pipe._get_clip_prompt_embeds(prompt=prompt, device=pipe.text_encoder.device) for prompt in prompts
            ]
        return [EncodedPrompt(txt[None].cpu(), vec.cpu()) for txt, vec in zip(texts, vectors, strict=True)]
    with torch.no_grad():
        pairs = [
            pipe.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=length, **more)[:2]
            for prompt in prompts
        ]
    return [EncodedPrompt(txt.cpu(), vec.cpu()) for txt, vec in pairs]


def image_pipeline(base: Base, transformer: Any, *, with_vae: bool = True) -> Any:
    """A FluxPipeline of this transformer and the base's VAE alone. A base that was trained on quantised is drawn with
    quantised: the card may hold no other."""
    from diffusers import FluxPipeline

    without = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", *(() if with_vae else ("vae",)))
    )
    pipe = FluxPipeline.from_pretrained(
        base.folder, **without, transformer=transformer, dtype=base.dtype, variant=base.variant, use_safetensors=True
    )
    if with_vae:
        pipe.vae.to(base.device, memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_lora(pipe: Any, file: Path) -> None:
    """The transformer's part of a LoRA file, if it has one, into a pipeline without text encoders."""
    state, _, metadata = pipe.lora_state_dict(
        file.parent, weight_name=file.name, return_alphas=True, return_lora_metadata=True
    )
    if any(name.startswith("transformer.") for name in state):
        pipe.load_lora_into_transformer(state, None, pipe.transformer, metadata=metadata, _pipeline=pipe)
        where = pipe.transformer.device
        for name, parameter in pipe.transformer.named_parameters():
            if ".lora_" in name:  # made where its layer is, which may wait in host memory
                parameter.data = parameter.data.to(where)


def size_of(spec: Spec) -> int:
    """The side of a run's pictures in pixels."""
    assert spec.validation.size is not None  # the spec resolves it
    return spec.validation.size


def draw_image(
    pipe: Any, read: EncodedPrompt, seed: int, *, steps: int, size: int, guidance: float = GUIDANCE, scale: float = 1.0
) -> Image.Image:
    [image] = draw_batch(pipe, read, [seed], steps=steps, size=size, guidance=guidance, scale=scale)
    return image


def draw_batch(
    pipe: Any,
    read: EncodedPrompt,
    seeds: Sequence[int],
    *,
    steps: int,
    size: int,
    guidance: float = GUIDANCE,
    scale: float = 1.0,
) -> list[Image.Image]:
    """One picture per seed. The noise comes from CPU generators, so that a seed means the same on every device."""
    count = len(seeds)
    images: list[Image.Image] = pipe(
        prompt_embeds=read.txt.to(pipe.device).expand(count, -1, -1),
        pooled_prompt_embeds=read.vec.to(pipe.device).expand(count, -1),
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        joint_attention_kwargs=None if scale == 1.0 else {"scale": scale},
    ).images
    return images


def draw_samples(
    base: Base, exported: ExportedFiles | None, prompts: Sequence[tuple[str, int]], *,
    length: int, steps: int, size: int, guidance: float = GUIDANCE, scale: float = 1.0,
) -> list[Image.Image]:  # fmt: skip
    """(prompt, seed) each -> pictures. Encoders and transformer are on the device one after the other."""
    pipe = text_pipeline(base, exported)
    placeholders = exported.placeholders if exported else ()
    reads = read_prompts(
        pipe, [tokens.expand_placeholders(prompt, placeholders) for prompt, _ in prompts], length, scale
    )
    del pipe
    release(base.device)
    pipe = image_pipeline(base, loading.load_transformer(base))
    if exported is not None and exported.lora is not None:
        load_lora(pipe, exported.lora)
    return [
        draw_image(pipe, read, seed, steps=steps, size=size, guidance=guidance, scale=scale)
        for read, (_, seed) in zip(reads, prompts, strict=True)
    ]
