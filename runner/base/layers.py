"""The linear layers of FLUX.1's transformer and of CLIP-L by name and shape, from their configs, and which a LoRA
adapts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def checkpointed_blocks(blocks: int, every: int) -> range:
    """Indices of the blocks that gradient checkpointing of every n-th block (0: of none) recomputes. Never the last
    one: the backward pass starts with it, so its activations would be in memory anyway."""
    return range(0, blocks - 1, every) if every else range(0)


# FLUX.1's published configs (black-forest-labs/FLUX.1-dev, transformer/config.json), for plans without its files.
FLUX1: dict[str, Any] = {
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
CLIP_L = {"hidden_size": 768, "num_hidden_layers": 12}  # FLUX.1's text_encoder/config.json
REQUIRED_KEYS = tuple(FLUX1)
KNOWN_BASES = {
    f"black-forest-labs/FLUX.1-{kind}": {**FLUX1, "guidance_embeds": kind != "schnell"}
    for kind in ("dev", "schnell", "Krea-dev")
}


def clip_layers(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The linear layers of a CLIPTextModel's attention, which its LoRA adapts: module suffix -> (out, in) features."""
    width = config["hidden_size"]
    return {
        f"encoder.layers.{index}.self_attn.{name}": (width, width)
        for index in range(config["num_hidden_layers"])
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }


def linear_layers(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Every linear layer of a FluxTransformer2DModel: diffusers' module name -> (out, in) features."""
    d = config["attention_head_dim"] * config["num_attention_heads"]
    layers = {
        "time_text_embed.timestep_embedder.linear_1": (d, 256),
        "time_text_embed.timestep_embedder.linear_2": (d, d),
        "time_text_embed.text_embedder.linear_1": (d, config["pooled_projection_dim"]),
        "time_text_embed.text_embedder.linear_2": (d, d),
        "context_embedder": (d, config["joint_attention_dim"]),
        "x_embedder": (d, config["in_channels"]),
        "norm_out.linear": (2 * d, d),
        "proj_out": (config.get("out_channels") or config["in_channels"], d),
    }
    if config.get("guidance_embeds"):
        layers["time_text_embed.guidance_embedder.linear_1"] = (d, 256)
        layers["time_text_embed.guidance_embedder.linear_2"] = (d, d)
    for index in range(config["num_layers"]):
        layers.update((f"transformer_blocks.{index}.{name}", shape) for name, shape in _double_block(d))
    for index in range(config["num_single_layers"]):
        layers.update((f"single_transformer_blocks.{index}.{name}", shape) for name, shape in _single_block(d))
    return layers


def _double_block(d: int) -> Iterator[tuple[str, tuple[int, int]]]:
    for name in ("norm1.linear", "norm1_context.linear"):
        yield name, (6 * d, d)
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        yield f"attn.{name}", (d, d)
    for name in ("ff", "ff_context"):
        yield f"{name}.net.0.proj", (4 * d, d)
        yield f"{name}.net.2", (d, 4 * d)


def _single_block(d: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield "norm.linear", (3 * d, d)
    yield "proj_mlp", (4 * d, d)
    yield "proj_out", (d, 5 * d)
    for name in ("to_q", "to_k", "to_v"):
        yield f"attn.{name}", (d, d)


ATTENTION = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0")
CONTEXT = ("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")
PRESETS = {
    "attention": ATTENTION,
    "attention+mlp": ATTENTION + CONTEXT + MLP,
    "all": ATTENTION + CONTEXT + MLP + MODULATION + ("proj_mlp", "proj_out"),
}


OUTSIDE = ("proj_out",)  # the model's last layer, which no preset names: other trainers' "all" means the blocks


def lora_layers(
    layers: Mapping[str, tuple[int, int]],
    wanted: str | tuple[str, ...],
    presets: Mapping[str, tuple[str, ...]] = PRESETS,
    outside: tuple[str, ...] = OUTSIDE,
) -> dict[str, tuple[int, int]]:
    """The layers that a preset or a list of suffixes names, in the model's order, with their (out, in) features.

    A suffix matches whole components of a name, as in peft. So a listed `proj_out` also names the model's last layer,
    which is `outside` the presets.
    """
    suffixes = presets[wanted] if isinstance(wanted, str) else wanted
    chosen = {
        name: shape for name, shape in layers.items() if any(name == s or name.endswith("." + s) for s in suffixes)
    }
    if isinstance(wanted, str):
        for name in outside:
            chosen.pop(name, None)
    return chosen
