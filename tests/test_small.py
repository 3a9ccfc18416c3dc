"""Keys for small cards: what is recomputed, which attention, what waits in host memory. None changes what is learned, but
for another attention's rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import House, desk_of
from test_objective import jolt, objective_of, spec_of
from torch import Tensor, nn

from runner import attention, flux
from runner.errors import FluxrunError


def with_model(house: House, lines: str, **changes: str) -> Path:
    return spec_of(house, base=f'base = "builtin:tiny"\n{lines}', **changes)


def gradients(spec: Path) -> tuple[Tensor, dict[str, Tensor]]:
    objective, kinds = objective_of(desk_of(spec))
    jolt(kinds)
    return stepped(objective, kinds)


def stepped(objective: Any, kinds: dict[str, dict[str, nn.Parameter]]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = objective.loss(2, 0)
    loss.backward()
    found = {name: value.grad for kind in kinds.values() for name, value in kind.items()}
    assert all(grad is not None and grad.any() for grad in found.values())
    return loss.detach(), found


def equal(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> bool:
    return torch.equal(one[0], other[0]) and all(torch.equal(one[1][name], other[1][name]) for name in other[1])


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


def test_recomputing_some_blocks_changes_no_bit_and_keeps_less(house: House) -> None:
    """Of the tiny base's two and four blocks; with dropout, whose draws must come again."""
    found, held = [], []
    for every in ("false", "true", "1", "2", "5", "9"):
        spec = with_model(house, f"gradient_checkpointing = {every}", rank="rank = 4\ndropout = 0.3")
        size = [0]

        def pack(tensor: Tensor, size: list[int] = size) -> Tensor:
            size[0] += tensor.numel()
            return tensor

        objective, kinds = objective_of(desk_of(spec))
        jolt(kinds)
        calls = count_calls(objective.transformer)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective.loss(2, 0)
        calls.clear()
        found.append(stepped(objective, kinds))
        held.append(size[0])
        assert len(calls) == 6 + {"false": 0, "true": 6, "1": 6, "2": 3, "5": 2, "9": 1}[every]
    assert all(equal(found[0], other) for other in found[1:])
    assert held[1] == held[2] < held[3] < held[4] < held[5] < held[0]


def count_calls(transformer: Any) -> list[str]:
    calls: list[str] = []
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    return calls


# ---- attention -----------------------------------------------------------------------------------------------------


def test_the_backends_are_diffusers_own() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert set(attention.BACKENDS) <= {one.value for one in AttentionBackendName}
    assert {*attention.PACKAGES, *attention.ON_A_GPU, *attention.HALF} <= set(attention.BACKENDS)


@pytest.mark.parametrize("backend", [one for one in attention.BACKENDS if one not in attention.ON_A_GPU])
def test_every_attention_of_a_cpu_trains(house: House, backend: str) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    loss, found = gradients(with_model(house, f'attention = "{backend}"'))
    plain, wanted = gradients(spec_of(house))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-3 * grad.norm(), name
    assert _AttentionBackendRegistry.get_active_backend()[0].value == "native"  # the next run has not asked for it


@pytest.mark.parametrize("backend", attention.ON_A_GPU)
def test_attention_that_is_not_here_is_refused_when_it_is_loaded(house: House, backend: str) -> None:
    transformer = flux.load_transformer(desk_of(spec_of(house)).base)
    with pytest.raises(FluxrunError, match=f"model.attention: {backend} needs an NVIDIA GPU"):
        flux.set_attention(transformer, backend)


def test_half_attention_and_fp32_do_not_go_together(house: House) -> None:
    spec = with_model(house, 'attention = "_native_cudnn"\ndtype = "fp32"')
    said = house.fluxrun("plan", spec)
    assert said.code == 2
    assert 'model.attention: _native_cudnn takes bf16 and fp16 alone (model.dtype is fp32); use "native"' in said.err
