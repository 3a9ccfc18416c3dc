"""Loading a part of the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runner.model import base as bases
from runner.model import loading as part_loading
from runner.model.flux1 import loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_part_read_straight_to_its_device_is_what_the_libraries_read(dtype: torch.dtype) -> None:
    """The way to a GPU, here to the CPU: every tensor, its dtype (T5 keeps some in fp32), and what comes out."""
    base = bases.open_base("builtin:tiny", None, None, torch.device("cpu"), dtype)
    for part, empty, load in (
        ("transformer", loading.empty_transformer, loading.load_transformer),
        ("text_encoder_2", loading.empty_t5, loading.load_t5),
    ):
        theirs, ours = load(base), part_loading.load_streaming(empty, base, part)
        told, made = theirs.state_dict(), ours.state_dict()
        assert told.keys() == made.keys()
        for name, tensor in told.items():
            assert tensor.dtype == made[name].dtype, name
            assert torch.equal(tensor, made[name]), name
        assert not ours.training
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids)[0], ours(ids)[0])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_the_vae_is_in_memory_once() -> None:
    """Its convolutions are copied into another order; the file they come from is let go."""
    base = bases.open_base("builtin:tiny", None, None, torch.device("cpu"), torch.float16)  # as its file has it
    vae = loading.load_vae(base)
    assert str(base.folder / "vae") not in Path("/proc/self/maps").read_text()
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in vae.parameters() if one.dim() == 4)
