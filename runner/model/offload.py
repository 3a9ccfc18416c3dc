"""Blocks of a frozen model that wait in host memory: on the device are those at work and the one that comes next.

Not diffusers' group offloading: its hooks know the forward pass. In a backward pass with checkpointing they bring the block
behind the one that is recomputed, and since the recomputation ends early (torch stops it at the last tensor it needs) none
is taken away again, so that the whole model is on the device when the step ends. Without checkpointing the backward pass
finds the weights gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runner.model.device import CopyStream, PendingCopy, to_pinned

Forward = Callable[..., Any]


class BlockOffloader:
    """Blocks that run one after another. A pass that leaves gradients recomputes each block when its turn comes back: what the
    graph then holds are the weights on the device, which go with it.

    They are tensors of their own, put in the place of those in host memory. Exchanging `.data` would not do: the graph may
    hold the parameter itself, and would then compute with whatever it is by then.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.lane = CopyStream(device)
        self.places = [list(_places(block)) for block in blocks]  # before an adapter is there: that one stays
        self.hosts = [[to_pinned(device, table[name]) for table, name in places] for places in self.places]
        self.coming: dict[int, PendingCopy] = {}
        self.last = 0
        for index, block in enumerate(blocks):
            self._put(index, self.hosts[index])
            block.forward = self._forward(index, partial(_forward_of, block))  # type: ignore[method-assign]

    def _forward(self, index: int, forward: Forward) -> Forward:
        def run(*inputs: Any, **named: Any) -> Any:
            try:
                self._come(index)
                return forward(*inputs, **named)
            finally:  # a recomputation ends by an exception
                self._put(index, self.hosts[index])

        def run_twice(*inputs: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return run(*inputs, **named)
            return checkpoint(run, *inputs, use_reentrant=False, **named)

        return run_twice

    def _come(self, index: int) -> None:
        """Wait for a block; send for the next one in the direction that the pass has."""
        after = index + 1 if index > self.last else index - 1
        self.last = index
        for other in set(self.coming) - {index}:
            self.coming.pop(other).wait()  # a pass broke off, or turned
        arriving = self.coming.pop(index, None) or self.lane.send(self.hosts[index])
        self._put(index, arriving.wait())
        if 0 <= after < len(self.hosts):
            self.coming[after] = self.lane.send(self.hosts[after])

    def _put(self, index: int, tensors: Sequence[Tensor]) -> None:
        for (table, name), tensor in zip(self.places[index], tensors, strict=True):
            table[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(table[name], nn.Parameter) else tensor


def _forward_of(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Its class's, which may change."""
    return type(block).forward(block, *inputs, **named)


def _places(block: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the block's own tensors stand."""
    for module in block.modules():
        for table in (module._parameters, module._buffers):
            yield from ((table, name) for name, tensor in table.items() if tensor is not None)


def offload_blocks(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> nn.Module:
    """Put a model that is in host memory on the device, but for its blocks, which wait. `model.to` would bring them all."""
    waiting = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in waiting:
            tensor.data = tensor.data.to(device)
    BlockOffloader(blocks, device)  # which the blocks hold
    return model
