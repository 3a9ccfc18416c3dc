"""Laws of LoRA layouts, tried on drawn examples (hypothesis; the same ones each time)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.base.files import BUILTIN
from runner.base.layers import clip_layers, linear_layers, lora_layers
from runner.export import foreign_layouts, lora_layouts
from runner.export.lora_layouts import Adapter, Factors
from runner.model.flux1 import layer_names
from tests.support.laws import examples

# ---- specs ---------------------------------------------------------------------------------------------------------


# ---- plans ---------------------------------------------------------------------------------------------------------


# ---- layouts -------------------------------------------------------------------------------------------------------

TINY = BUILTIN["builtin:tiny"]
LINEAR = linear_layers(json.loads((TINY / "transformer" / "config.json").read_text()))
CLIP = clip_layers(json.loads((TINY / "text_encoder" / "config.json").read_text()))
TRAINABLE = [*lora_layers(LINEAR, "all"), "proj_out", "norm_out.linear", "x_embedder"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factors(shape: tuple[int, int], rank: int, alpha: float, dtype: torch.dtype, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    out, inside = shape
    down, up = torch.randn(rank, inside, generator=generator), torch.randn(out, rank, generator=generator)
    return Factors(down.to(dtype), up.to(dtype), alpha)


@st.composite
def adapters(draw: Callable[[Any], Any]) -> Adapter:
    """Any layers, all of one rank, alpha and dtype, as a run trains them."""
    rank, alpha, dtype = draw(st.integers(1, 5)), draw(st.floats(0.1, 16)), draw(st.sampled_from(DTYPES))
    chosen = draw(st.lists(st.sampled_from(TRAINABLE), min_size=1, max_size=8, unique=True))
    text = draw(st.lists(st.sampled_from(list(CLIP)), max_size=3, unique=True))
    return Adapter(
        {name: factors(LINEAR[name], rank, alpha, dtype, seed) for seed, name in enumerate(chosen)},
        {name: factors(CLIP[name], rank, alpha, dtype, 100 + seed) for seed, name in enumerate(text)},
    )


@examples(30)
@given(adapters())
def test_the_original_layout_gives_back_the_factors(adapter: Adapter) -> None:
    """To the bit, also where several of them became one matrix."""
    back = foreign_layouts.read(lora_layouts.to_kohya(adapter), {}).adapter
    for ours, theirs in ((adapter.transformer, back.transformer), (adapter.text, back.text)):
        assert ours.keys() == theirs.keys()
        for name, part in ours.items():
            assert torch.equal(theirs[name].down, part.down), name
            assert torch.equal(theirs[name].up, part.up), name
            assert theirs[name].up.dtype == part.up.dtype
            assert theirs[name].scale == pytest.approx(part.scale, rel=1e-6)


@examples(30)
@given(adapters())
def test_diffusers_layout_gives_back_the_changes(adapter: Adapter) -> None:
    """The scale is in B there, in fp32 where its own dtype cannot hold that: nothing is rounded."""
    back = lora_layouts.from_diffusers(lora_layouts.to_diffusers(adapter), {})
    for ours, theirs in ((adapter.transformer, back.transformer), (adapter.text, back.text)):
        assert ours.keys() == theirs.keys()
        for name, part in ours.items():
            wanted = part.scale * (part.up.float() @ part.down.float())
            assert lora_layouts.difference(part, theirs[name]) <= 1e-6 * float(wanted.abs().max()), name


@examples(20)
@given(st.integers(1, 5), st.floats(0.25, 16), st.floats(0.25, 16))
def test_alpha_is_what_the_metadata_says(rank: int, own: float, other: float) -> None:
    """Of a diffusers file: the adapter's own, but for layers that a pattern names; the rank where nothing is said. By
    the reader of our files and by that of others'."""
    q, k = (f"transformer_blocks.0.attn.to_{letter}" for letter in "qk")
    made = {name: factors(LINEAR[name], rank, 1.0, torch.float32, seed) for seed, name in enumerate((q, k))}
    named = {f"transformer.{name}.lora_A.weight": one.down for name, one in made.items()}
    named |= {f"transformer.{name}.lora_B.weight": one.up for name, one in made.items()}
    plain = {"transformer.lora_alpha": own, "transformer.r": rank}
    patterned = {**plain, "transformer.alpha_pattern": {k: other}}
    for config, wanted in (({}, (rank, rank)), (plain, (own, own)), (patterned, (own, other))):
        for found in (lora_layouts.from_diffusers(named, config), foreign_layouts.read(named, config).adapter):
            scales = tuple(found.transformer[name].scale for name in (q, k))
            assert scales == pytest.approx([alpha / rank for alpha in wanted], rel=1e-6)


@examples(20)
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0.25, 8)), min_size=3, max_size=3))
def test_parts_of_any_rank_and_alpha_fuse_into_their_changes(parts: list[tuple[int, float]]) -> None:
    """As files of others have them: each part's change comes back, whatever its neighbours are."""
    names = [f"transformer_blocks.0.{name}" for name in layer_names.QKV]
    made = {
        name: factors(LINEAR[name], rank, alpha, torch.float32, seed)
        for seed, (name, (rank, alpha)) in enumerate(zip(names, parts, strict=True))
    }
    back = foreign_layouts.read(lora_layouts.to_kohya(Adapter(made, {})), {}).adapter.transformer
    for name, part in made.items():
        wanted = part.scale * (part.up @ part.down)
        found = back[name].scale * (back[name].up.float() @ back[name].down.float())
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())), name


# ---- schedules -----------------------------------------------------------------------------------------------------


# ---- buckets and batches -------------------------------------------------------------------------------------------
