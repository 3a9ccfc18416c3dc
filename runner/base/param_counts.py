"""How many parameters each part of a FLUX.1 model has, from its config alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.base.files import local_folder
from runner.base.layers import CLIP_L, FLUX1, KNOWN_BASES, linear_layers

Config = Mapping[str, Any]

# FLUX.1's other published configs (text_encoder, text_encoder_2, vae of black-forest-labs/FLUX.1-dev). What a local
# config leaves out is taken from here.
CLIP: Config = {
    **CLIP_L, "intermediate_size": 3072, "num_attention_heads": 12, "vocab_size": 49408, "max_position_embeddings": 77,
}  # fmt: skip
T5: Config = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
}  # fmt: skip
VAE: Config = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "in_channels": 3,
    "out_channels": 3, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class BaseConfigs:
    """The configs of a base's four parts. Compared by identity, so that results can be cached by it."""

    transformer: Config
    clip: Config
    t5: Config
    vae: Config

    @cached_property
    def parameters(self) -> dict[str, tuple[int, int]]:
        """By part: (in the matrices that `model.quantize` makes smaller, all others)."""
        return {
            "transformer": transformer_parameters(self.transformer),
            "text_encoder": (0, clip_parameters(self.clip)),
            "text_encoder_2": t5_parameters(self.t5),
            "vae": (0, vae_parameters(self.vae)),
        }

    @property
    def blocks(self) -> int:
        """How many blocks the transformer has."""
        return int(self.transformer["num_layers"] + self.transformer["num_single_layers"])

    def offloaded_parameters(self, part: str) -> tuple[int, int]:
        """`parameters` of what is on the device while a large part is offloaded: two of its largest blocks, and all
        that is in no block."""
        matrices, other = self.parameters[part]
        if part == "text_encoder_2":
            return 2 * matrices // self.t5["num_layers"], other
        by_block: dict[str, int] = {}
        for name, (out, inside) in linear_layers(self.transformer).items():
            block = ".".join(name.split(".")[:2]) if "blocks." in name else ""
            by_block[block] = by_block.get(block, 0) + out * inside
        outside = by_block.pop("", 0)
        return 2 * max(by_block.values()) + outside, other


def read_base_configs(base: str) -> BaseConfigs | None:
    """None for a hub base whose config is not known, and for a folder whose configs cannot be read, which
    `broken_configs` reports."""
    folder = local_folder(base)
    if folder is None:
        return BaseConfigs({**FLUX1, **KNOWN_BASES[base]}, CLIP, T5, VAE) if base in KNOWN_BASES else None
    defaults = {"transformer": {}, "text_encoder": CLIP, "text_encoder_2": T5, "vae": VAE}
    try:
        configs = BaseConfigs(*({**default, **_read_config(folder, part)} for part, default in defaults.items()))
        assert configs.parameters  # raises where a value is missing
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return configs


def _read_config(folder: Path, part: str) -> Config:
    config: Config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    return config


def transformer_parameters(config: Config) -> tuple[int, int]:
    """(in linear layers, biases and norms) of a FluxTransformer2DModel."""
    layers = linear_layers(config)
    matrices = sum(out * inside for out, inside in layers.values())
    norms = config["attention_head_dim"] * (4 * config["num_layers"] + 2 * config["num_single_layers"])
    return matrices, sum(out for out, _ in layers.values()) + norms


def clip_parameters(config: Config) -> int:
    """Of a CLIPTextModel."""
    w, f = config["hidden_size"], config["intermediate_size"]
    layer = 4 * (w * w + w) + 2 * w * f + f + w + 4 * w
    tables = (config["vocab_size"] + config["max_position_embeddings"]) * w
    return int(tables + config["num_hidden_layers"] * layer + 2 * w)


def t5_parameters(config: Config) -> tuple[int, int]:
    """(in linear layers, embeddings and norms) of a T5EncoderModel."""
    d, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    layers = config["num_layers"]
    table = config["vocab_size"] * d + config["relative_attention_num_buckets"] * config["num_heads"]
    return layers * (4 * d * inner + 3 * d * config["d_ff"]), table + layers * 2 * d + d


def vae_parameters(config: Config) -> int:
    """Of an AutoencoderKL: encoder, decoder and the convolutions between them."""
    c, layers, latent = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]

    def conv(inside: int, out: int, side: int = 3) -> int:
        return side * side * inside * out + out

    def resnet(inside: int, out: int) -> int:
        shortcut = conv(inside, out, 1) if inside != out else 0
        return 2 * inside + conv(inside, out) + 2 * out + conv(out, out) + shortcut

    last = c[-1]
    middle = 2 * resnet(last, last) + 2 * last + 4 * conv(last, last, 1)
    down = conv(config["in_channels"], c[0]) + middle + 2 * last + conv(last, 2 * latent)
    up = conv(latent, last) + middle + 2 * c[0] + conv(c[0], config["out_channels"])
    for index, out in enumerate(c):
        inside = c[max(0, index - 1)]
        down += resnet(inside, out) + (layers - 1) * resnet(out, out)
    for index, out in enumerate(reversed(c)):
        inside = c[min(len(c) - 1, len(c) - index)]
        up += resnet(inside, out) + layers * resnet(out, out)
    down += sum(conv(side, side) for side in c[:-1])  # between the levels
    up += sum(conv(side, side) for side in c[1:])
    quant = conv(2 * latent, 2 * latent, 1) * bool(config["use_quant_conv"])
    quant += conv(latent, latent, 1) * bool(config["use_post_quant_conv"])
    return int(down + up + quant)


# Parameters of FLUX.1's parts besides the transformer (sums over the published files), for plans without its files.
FLUX1_PARTS = {"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656, "vae": 83_819_683}


def parameter_counts(base: str, counted: Mapping[str, int]) -> Mapping[str, int]:
    """How many parameters each part of a base has. counted: from its files; where empty, known bases are looked up."""
    if base in KNOWN_BASES and not counted:
        layers = linear_layers(KNOWN_BASES[base]).values()
        return {**FLUX1_PARTS, "transformer": sum(out * inside for out, inside in layers)}
    return counted
