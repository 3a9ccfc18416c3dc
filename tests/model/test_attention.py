"""Attention backends."""

from __future__ import annotations

import pytest
import torch

from runner.core.errors import FluxrunError
from runner.model.flux1 import loading
from runner.model.flux1.transformer import set_attention
from runner.spec import attention
from tests.support.house import House
from tests.support.objectives import gradients, spec_of, with_model
from tests.support.runs import context_of


def test_the_backends_are_diffusers_own() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert set(attention.BACKENDS) <= {one.value for one in AttentionBackendName}
    assert {*attention.PACKAGES, *attention.GPU_ONLY, *attention.HALF_PRECISION_ONLY} <= set(attention.BACKENDS)


@pytest.mark.parametrize("backend", [one for one in attention.BACKENDS if one not in attention.GPU_ONLY])
def test_every_attention_of_a_cpu_trains(house: House, backend: str) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    loss, found = gradients(with_model(house, f'attention = "{backend}"'))
    assert _AttentionBackendRegistry.get_active_backend()[0].value == "native"  # the next run has not asked for it
    plain, wanted = gradients(spec_of(house))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-3 * grad.norm(), name


@pytest.mark.parametrize("backend", attention.GPU_ONLY)
def test_attention_that_is_not_here_is_refused_when_it_is_loaded(house: House, backend: str) -> None:
    transformer = loading.load_transformer(context_of(spec_of(house)).base)
    with pytest.raises(FluxrunError, match=f"model.attention: {backend} needs an NVIDIA GPU"):
        set_attention(transformer, backend)


def test_half_attention_and_fp32_do_not_go_together(house: House) -> None:
    spec = with_model(house, 'attention = "_native_cudnn"\ndtype = "fp32"')
    said = house.fluxrun("plan", spec)
    assert said.code == 2
    assert 'model.attention: _native_cudnn needs model.dtype bf16 or fp16, got fp32; use "native"' in said.err
