"""FLUX.1 through stock diffusers, which is what a user of the exports has: FluxPipeline in two halves, text and
images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from runner.model.base import Base
from runner.model.family import PromptEmbeds
from runner.model.flux1 import loading


class Flux1TextPipeline:
    """A FluxPipeline of the two text encoders alone."""

    def __init__(self, pipe: Any) -> None:
        """pipe: a FluxPipeline; its text_encoder_2 and tokenizer_2 may be None."""
        self.pipe = pipe

    @classmethod
    def load(cls, base: Base, *, with_t5: bool = True) -> Flux1TextPipeline:
        from diffusers import FluxPipeline

        t5 = {"text_encoder_2": loading.load_t5(base)} if with_t5 else {"text_encoder_2": None, "tokenizer_2": None}
        pipe = FluxPipeline.from_pretrained(
            base.folder, transformer=None, vae=None, **t5, dtype=base.dtype, variant=base.variant, use_safetensors=True
        )
        pipe.text_encoder.to(base.device)  # not the whole pipeline: T5's blocks may wait in host memory
        return cls(pipe)

    @property
    def encoders(self) -> Mapping[str, tuple[Any, Any]]:
        pipe = self.pipe
        loaded = {"clip": (pipe.text_encoder, pipe.tokenizer), "t5": (pipe.text_encoder_2, pipe.tokenizer_2)}
        return {name: parts for name, parts in loaded.items() if parts[0] is not None}

    def load_embeddings(self, file: Path, token_strings: Sequence[str]) -> None:
        """As the model card tells a user to: each encoder gets the rows that were learned for it."""
        pipe, strings, rows = self.pipe, list(token_strings), load_file(file)
        pipe.load_textual_inversion(
            rows["clip_l"], token=strings, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
        )
        if "t5" in rows:
            pipe.load_textual_inversion(
                rows["t5"], token=strings, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
            )

    def load_lora(self, file: Path) -> None:
        """CLIP's part of the file, if it has one; `load_lora_weights` would ask for a transformer in the pipeline."""
        pipe = self.pipe
        state, _, metadata = _lora_state(pipe, file)
        if any(name.startswith("text_encoder.") for name in state):
            pipe.load_lora_into_text_encoder(
                state, None, pipe.text_encoder, prefix="text_encoder", metadata=metadata, _pipeline=pipe
            )

    def read(
        self,
        prompts: Sequence[str],
        length: int,
        *,
        scale: float = 1.0,
        cached: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> list[PromptEmbeds]:
        """length: T5's tokens; cached: "t5" -> [T, width] of each prompt, for a pipeline without T5."""
        pipe, more = self.pipe, {} if scale == 1.0 else {"lora_scale": scale}
        with torch.no_grad():
            if cached:
                vectors = [
                    pipe._get_clip_prompt_embeds(prompt=prompt, device=pipe.text_encoder.device) for prompt in prompts
                ]
                return [PromptEmbeds(txt[None], vec).cpu() for txt, vec in zip(cached["t5"], vectors, strict=True)]
            pairs = [
                pipe.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=length, **more)[:2]
                for prompt in prompts
            ]
        return [PromptEmbeds(txt, vec).cpu() for txt, vec in pairs]


class Flux1ImagePipeline:
    """A FluxPipeline of a transformer and the base's VAE alone."""

    def __init__(self, pipe: Any) -> None:
        """pipe: a FluxPipeline without text encoders."""
        self.pipe = pipe

    @classmethod
    def load(cls, base: Base, transformer: Any, *, with_vae: bool = True) -> Flux1ImagePipeline:
        """A transformer that was trained on quantized is drawn with as it is: the card may hold no other."""
        from diffusers import FluxPipeline

        left_out = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", *(() if with_vae else ("vae",)))
        pipe = FluxPipeline.from_pretrained(
            base.folder,
            **dict.fromkeys(left_out),
            transformer=transformer,
            dtype=base.dtype,
            variant=base.variant,
            use_safetensors=True,
        )
        if with_vae:
            pipe.vae.to(base.device, memory_format=torch.channels_last)
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe)

    @property
    def transformer(self) -> Any:
        return self.pipe.transformer

    def load_lora(self, file: Path) -> None:
        pipe = self.pipe
        state, _, metadata = _lora_state(pipe, file)
        if any(name.startswith("transformer.") for name in state):
            pipe.load_lora_into_transformer(state, None, pipe.transformer, metadata=metadata, _pipeline=pipe)
            device = pipe.transformer.device
            for name, parameter in pipe.transformer.named_parameters():
                if ".lora_" in name:  # made where its layer is, which may wait in host memory
                    parameter.data = parameter.data.to(device)

    def draw(
        self, prompt: PromptEmbeds, seeds: Sequence[int], *, steps: int, size: int, guidance: float, scale: float = 1.0
    ) -> list[Image.Image]:
        pipe, count = self.pipe, len(seeds)
        images: list[Image.Image] = pipe(
            prompt_embeds=prompt.txt.to(pipe.device).expand(count, -1, -1),
            pooled_prompt_embeds=prompt.vec.to(pipe.device).expand(count, -1),
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            joint_attention_kwargs=None if scale == 1.0 else {"scale": scale},
        ).images
        return images


def _lora_state(pipe: Any, file: Path) -> tuple[dict[str, Tensor], Any, Any]:
    """(tensors, alphas, adapter metadata) of a LoRA file, by diffusers' own reader."""
    state: tuple[dict[str, Tensor], Any, Any] = pipe.lora_state_dict(
        file.parent, weight_name=file.name, return_alphas=True, return_lora_metadata=True
    )
    return state
