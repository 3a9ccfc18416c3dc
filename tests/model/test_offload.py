"""Blocks that wait in host memory train to the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from runner.model import device, offload
from runner.model.device import CopyStream, PendingCopy
from tests.support.house import House
from tests.support.objectives import equal, gradients, jolt, objective_of, stepped, with_model
from tests.support.runs import context_of

# ---- gradient checkpointing ----------------------------------------------------------------------------------------


# ---- attention -----------------------------------------------------------------------------------------------------


# ---- offloading ----------------------------------------------------------------------------------------------------


class Sent(CopyStream):
    """A lane whose host memory holds nothing but NaN: whatever is computed with must have been sent. It counts what is
    there."""

    def __init__(self, where: torch.device) -> None:
        super().__init__(where)
        self.true: dict[int, Tensor] = {}
        self.order: list[int] = []

    def send(self, hosts: Any) -> PendingCopy:
        for host in hosts:
            if id(host) not in self.true:
                self.true[id(host)] = host.clone()
                host.view(torch.uint8).fill_(0xFF)  # NaN in every float, -1 in int8
        self.order.append(id(hosts))
        return PendingCopy([self.true[id(host)].clone() for host in hosts], None)


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
def test_offloaded_blocks_train_to_the_same_bits(house: House, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """LoRA with dropout, and rows through T5's blocks. At most two blocks of each model are there at a time, and the
    backward pass brings them from the last to the first."""
    lines, changes = f'quantize = "{scheme}"', {"rank": "rank = 4\ndropout = 0.3"}
    wanted = gradients(with_model(house, lines, **changes))
    chains: list[offload.BlockOffloader] = []
    made, come = offload.BlockOffloader.__init__, offload.BlockOffloader._fetch
    there: list[int] = []
    order: list[tuple[int, int]] = []

    def noted(chain: offload.BlockOffloader, *what: Any) -> None:
        made(chain, *what)
        chains.append(chain)

    def coming(chain: offload.BlockOffloader, index: int) -> None:
        come(chain, index)
        order.append((chains.index(chain), index))
        there.append(len(chain.pending) + 1)

    monkeypatch.setattr(offload, "CopyStream", Sent)
    monkeypatch.setattr(offload.BlockOffloader, "__init__", noted)
    monkeypatch.setattr(offload.BlockOffloader, "_fetch", coming)
    objective, kinds = objective_of(context_of(with_model(house, f'{lines}\noffload = "blocks"', **changes)))
    jolt(kinds)
    order.clear()
    assert equal(stepped(objective, kinds), wanted)
    assert max(there) == 2
    flow, t5 = (chains.index(chain) for chain in chains[-2:])
    assert [index for which, index in order if which == flow] == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    assert [index for which, index in order if which == t5] == [0, 1, 1, 0]
    lane = chains[flow].stream
    assert isinstance(lane, Sent)
    assert len(lane.order) <= 14  # each once a pass, but for one where the pass turns: what comes next was foreseen


def test_offloading_and_what_it_does_not_go_with(house: House) -> None:
    spec = with_model(
        house,
        'offload = "blocks"\ngradient_checkpointing = 2\ncompile = true',
        encoders='encoders = ["clip"]\ngradient_checkpointing = "selective"',
    )
    said = house.fluxrun("plan", spec).err
    for table, every in (("model", 2), ("inversion", "'selective'")):
        told = f"offloaded blocks are always recomputed, got {every}; remove this key"
        assert f"{table}.gradient_checkpointing: {told}" in said
    assert "model.compile: compiled blocks cannot be offloaded, got true; remove this key or model.offload" in said


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["none", "int8", "fp8", "nf4"])
def test_on_a_gpu_offloaded_blocks_train_to_the_same_bits_in_less_memory(house: House, scheme: str) -> None:
    found, peaks = [], []
    where = torch.device("cuda", 0)
    for where_they_wait in ("none", "blocks"):
        context = context_of(
            with_model(house, f'quantize = "{scheme}"\noffload = "{where_they_wait}"\ngradient_checkpointing = true')
        )
        context = replace(context, base=replace(context.base, device=where, dtype=torch.bfloat16))
        objective, kinds = objective_of(context)
        jolt(kinds)
        stepped(objective, kinds)
        for kind in kinds.values():
            for value in kind.values():
                value.grad = None
        device.release(where)
        device.reset_peak(where)
        found.append(stepped(objective, kinds))
        torch.cuda.synchronize(where)
        peaks.append(device.peak_memory(where))
        del objective, kinds
        device.release(where)
    assert equal(found[0], found[1])
    assert peaks[1] < peaks[0]


# ---- compiling -----------------------------------------------------------------------------------------------------
