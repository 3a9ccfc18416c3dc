"""What a plan must know of a model family without loading it: its text encoders and its linear layers. One entry per
family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from runner.base import layers
from runner.core.errors import FluxrunError

Config = Mapping[str, Any]
LayerShapes = dict[str, tuple[int, int]]  # module name -> (out, in) features


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family, by the name that specs, the cache and checkpoints call it.

    parts: folders of the base that its embeddings depend on. length: how many tokens it reads of a caption; None:
    `model.max_sequence_length`. pooled: it gives one vector, read at a position that `inversion.pooling` chooses.
    large: it is quantized and offloaded as the transformer is, and is not loaded for texts that the cache has.
    lora_layers: what `text_lora` adapts in it, from its config; None: it cannot be adapted.
    """

    name: str
    parts: tuple[str, ...]
    length: int | None = None
    pooled: bool = False
    large: bool = False
    lora_layers: Callable[[Config], LayerShapes] | None = None


@dataclass(frozen=True)
class Architecture:
    """A model family by its configs.

    transformer: `_class_name` of the transformer's config, which a base's family is found by. encoders: by name, in the
    order in which they encode. needed: by part, the integers that its config must give. linear_layers: of the
    transformer, from its config. presets: values of `lora.layers` -> suffixes of layer names; outside: layers that no
    preset names.
    """

    name: str
    transformer: str
    encoders: Mapping[str, TextEncoder]
    needed: Mapping[str, tuple[str, ...]]
    linear_layers: Callable[[Config], LayerShapes]
    presets: Mapping[str, tuple[str, ...]]
    outside: tuple[str, ...] = ()

    @property
    def text_lora_encoder(self) -> TextEncoder | None:
        """The encoder that `text_lora` adapts; a family has one at most."""
        return next((encoder for encoder in self.encoders.values() if encoder.lora_layers), None)

    def lora_layers(self, config: Config, wanted: str | tuple[str, ...]) -> LayerShapes:
        """The layers that a LoRA adapts: those of a preset, or those whose names end in one of the suffixes."""
        return layers.lora_layers(self.linear_layers(config), wanted, self.presets, self.outside)


CLIP = TextEncoder("clip", ("text_encoder", "tokenizer"), length=77, pooled=True, lora_layers=layers.clip_layers)
T5 = TextEncoder("t5", ("text_encoder_2", "tokenizer_2"), large=True)
FLUX1 = Architecture(
    "FLUX.1",
    "FluxTransformer2DModel",
    {encoder.name: encoder for encoder in (CLIP, T5)},
    {"transformer": layers.REQUIRED_KEYS, "text_encoder": tuple(layers.CLIP_L)},
    layers.linear_layers,
    layers.PRESETS,
    layers.OUTSIDE,
)
ARCHITECTURES = {FLUX1.transformer: FLUX1}


def architecture_of(config: Config | None) -> Architecture:
    """The family of the base whose transformer has this config. None (a hub base that is not here) and a config without
    a class name are FLUX.1's. Raises FluxrunError for a class that no family has."""
    name = (config or {}).get("_class_name", FLUX1.transformer)
    if name not in ARCHITECTURES:
        supported = ", ".join(f"{family.transformer} ({family.name})" for family in ARCHITECTURES.values())
        raise FluxrunError(
            f"model.base: fluxrun cannot train this kind of transformer, got {name!r}; use a base with one of: {supported}"
        )
    return ARCHITECTURES[name]


def encoder_part(name: str) -> str:
    """The folder of a text encoder's weights, by the encoder's name; those of two families do not share one."""
    return next(family.encoders[name].parts[0] for family in ARCHITECTURES.values() if name in family.encoders)


def adapted_layers(config: Config, wanted: str | tuple[str, ...]) -> Mapping[str, tuple[int, int]]:
    """`Architecture.lora_layers` of a transformer's config. The runs of a sweep ask for the same ones, so they are
    kept."""
    return _adapted_layers(json.dumps(config, sort_keys=True), wanted)


@lru_cache(maxsize=64)
def _adapted_layers(text: str, wanted: str | tuple[str, ...]) -> Mapping[str, tuple[int, int]]:
    config = json.loads(text)
    return architecture_of(config).lora_layers(config, wanted)
