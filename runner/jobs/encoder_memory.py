"""Bytes that the text encoders save for the backward pass, and buffers of their and the VAE's forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

# Feature maps that the VAE holds at once, at full resolution; measured.
ENCODER_MAPS = 4.5  # of the first level's width
DECODER_MAPS = 4.0  # of the second level's width, which the last upsampling gives


def t5_saved(config: Config, captions: int, tokens: int, narrow: int, *, selective: bool = False) -> int:
    """Where token rows are trained, in the blocks of `runner.model.flux1.recompute_t5`. The encoder runs in its own
    dtype, of `narrow` bytes, without autocast."""
    count, d, inner = captions * tokens, config["d_model"], config["num_heads"] * config["d_kv"]
    attention = count * (inner * narrow * (1 if selective else 4) + config["num_heads"] * 4)
    gelu = 0 if selective else 2 * config["d_ff"]
    layer = attention + count * (2 * d + gelu) * narrow  # with the inputs of both norms
    bias = config["num_heads"] * tokens * tokens * narrow
    last_norm = count * d * (4 if narrow == 4 else 4 + narrow)  # transformers' own, in fp32
    return int(config["num_layers"] * layer + bias + last_norm)


def t5_buffers(config: Config, captions: int, tokens: int, narrow: int) -> int:
    """Of a forward pass that saves nothing."""
    bias = 2 * config["num_heads"] * tokens * tokens * narrow
    return int(captions * tokens * (5 * config["d_ff"] + 3 * config["d_model"]) * narrow + bias)


def clip_saved(config: Config, captions: int, narrow: int, lora_rank: int) -> int:
    """lora_rank: of the LoRA on its attention; 0 where token rows are trained instead."""
    count, w = captions * config["max_position_embeddings"], config["hidden_size"]
    layer = count * (6 * w + 2 * config["intermediate_size"]) * narrow
    adapters = count * (w + 4 * lora_rank) * 4 if lora_rank else 0
    return int(config["num_hidden_layers"] * (layer + adapters) + count * w * narrow)


def clip_buffers(config: Config, captions: int, narrow: int) -> int:
    """Of a forward pass that saves nothing."""
    count = captions * config["max_position_embeddings"]
    return int(count * (3 * config["intermediate_size"] + 4 * config["hidden_size"]) * narrow)


def vae_encoder_buffers(config: Config, pixels: int, narrow: int) -> int:
    return int(ENCODER_MAPS * config["block_out_channels"][0] * pixels * narrow)


def vae_decoder_buffers(config: Config, pixels: int, narrow: int) -> int:
    channels = config["block_out_channels"]
    return int(DECODER_MAPS * channels[min(1, len(channels) - 1)] * pixels * narrow)
