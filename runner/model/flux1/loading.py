"""FLUX.1's parts through diffusers and transformers, frozen. Every loader raises FluxrunError where the weights are
missing or no safetensors, and BadFileError where a file is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runner.model.base import Base
from runner.model.flux1.transformer import CachedRotary, blocks_of
from runner.model.loading import load_large_part, load_part
from runner.model.offload import offload_blocks


def load_clip(base: Base) -> nn.Module:
    from transformers import CLIPTextModel

    return load_part(CLIPTextModel, base, "text_encoder")


def load_t5(base: Base) -> nn.Module:
    from transformers import T5EncoderModel

    model: Any = load_large_part(T5EncoderModel, empty_t5, base, "text_encoder_2")
    return offload_blocks(model, list(model.encoder.block), base.device) if base.offload else model


def load_encoder(base: Base, encoder: str) -> nn.Module:
    """encoder: "clip" or "t5"."""
    return load_clip(base) if encoder == "clip" else load_t5(base)


def load_tokenizer(base: Base, encoder: str) -> Any:
    """encoder: "clip" or "t5"."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.folder, subfolder={"clip": "tokenizer", "t5": "tokenizer_2"}[encoder])


def load_vae(base: Base) -> nn.Module:
    """In channels-last, in which convolutions take half the time."""
    from diffusers import AutoencoderKL

    vae: Any = load_part(AutoencoderKL, base, "vae").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if base.device.type == "cpu":  # the others are the file's own pages, which would keep all of it in memory
        for parameter in vae.parameters():
            if parameter.dim() != 4:
                parameter.data = parameter.data.clone()
    return vae  # type: ignore[no-any-return]


def load_transformer(base: Base) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    model: Any = load_large_part(FluxTransformer2DModel, empty_transformer, base, "transformer")
    model.pos_embed = CachedRotary(model.pos_embed)
    return offload_blocks(model, blocks_of(model), base.device) if base.offload else model


def empty_t5(folder: Path) -> Any:
    """T5 of the folder's config, its weights uninitialised."""
    from transformers import T5EncoderModel

    return T5EncoderModel(T5EncoderModel.config_class.from_dict(json.loads((folder / "config.json").read_text())))


def empty_transformer(folder: Path) -> Any:
    """The transformer of the folder's config, its weights uninitialised."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))
