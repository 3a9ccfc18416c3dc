"""Adapters as they begin."""

from __future__ import annotations

import math

import torch

from runner.model import lora
from runner.model.flux1 import loading
from tests.support.bases import BASE


def test_adapters_start_at_the_base_and_from_the_seed() -> None:
    shape = lora.LoraShape(4, 8.0, 0.0, ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp"))
    first = lora.attach_lora(loading.load_transformer(BASE), shape, 0)
    again = lora.attach_lora(loading.load_transformer(BASE), shape, 0)
    other = lora.attach_lora(loading.load_transformer(BASE), shape, 1)
    assert list(first) == [f"{layer}.lora_{part}.weight" for layer in shape.layers for part in "AB"]
    for name, parameter in first.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, again[name])
        if ".lora_A." in name:
            assert math.isclose(float(parameter.std()), 1 / 4, rel_tol=0.15)
            assert not torch.equal(parameter, other[name])
        else:
            assert not parameter.any()
