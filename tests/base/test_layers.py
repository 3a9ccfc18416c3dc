"""The layers that an adapter may be put on."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from runner.base.layers import FLUX1, linear_layers, lora_layers
from tests.support.bases import BASE


@pytest.mark.parametrize("which", ["tiny", "FLUX.1-dev"])
def test_layer_shapes_are_the_models(which: str) -> None:
    from diffusers import FluxTransformer2DModel

    config = (
        {**FLUX1, "guidance_embeds": True}
        if which != "tiny"
        else json.loads((BASE.folder / "transformer/config.json").read_text())
    )
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    real = {name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linear_layers(config) == real


def test_presets_and_suffixes_choose_the_named_layers() -> None:
    layers = linear_layers({**FLUX1, "guidance_embeds": True})
    count = {name: len(lora_layers(layers, name)) for name in ("attention", "attention+mlp", "all")}
    assert count == {"attention": 19 * 4 + 38 * 3, "attention+mlp": 19 * 12 + 38 * 3, "all": 19 * 14 + 38 * 6}
    assert "proj_out" not in lora_layers(layers, "all")
    assert list(lora_layers(layers, ("single_transformer_blocks.3.attn.to_q",))) == [
        "single_transformer_blocks.3.attn.to_q"
    ]
    assert not lora_layers(layers, ("to_qq",))
