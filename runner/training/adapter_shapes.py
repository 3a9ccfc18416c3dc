"""The adapters that a run trains: rank, alpha and layer names, from its spec and its base's configs."""

from __future__ import annotations

import json
from typing import Any

from runner.base.architectures import architecture_of
from runner.model.base import Base
from runner.model.lora import LoraShape
from runner.spec.schema import Spec


def lora_shape(spec: Spec, base: Base) -> LoraShape:
    """Of the transformer's LoRA (`[lora]`)."""
    config = _config(base, "transformer")
    assert spec.lora.alpha is not None  # the spec resolves it
    layers = architecture_of(config).lora_layers(config, spec.lora.layers)
    return LoraShape(spec.lora.rank, spec.lora.alpha, spec.lora.dropout, tuple(layers))


def text_lora_shape(spec: Spec, base: Base) -> LoraShape:
    """Of the text encoder's LoRA (`[text_lora]`), which has no dropout."""
    adapter = spec.text_lora
    assert adapter is not None
    assert adapter.alpha is not None  # the spec resolves it
    encoder = architecture_of(_config(base, "transformer")).text_lora_encoder
    assert encoder is not None
    assert encoder.lora_layers is not None
    return LoraShape(adapter.rank, adapter.alpha, 0.0, tuple(encoder.lora_layers(_config(base, encoder.parts[0]))))


def _config(base: Base, part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((base.folder / part / "config.json").read_text())
    return config
