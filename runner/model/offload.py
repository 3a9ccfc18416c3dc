"""Blocks of a frozen model that wait in host memory: the device holds the block at work and the one that comes next.

diffusers' group offloading will not do, since its hooks know the forward pass alone. In a backward pass with gradient
checkpointing they fetch the block after the recomputed one, and none is taken away again: the recomputation ends early
(torch stops it at the last tensor it needs), so the whole model is on the device when the step ends. Without
checkpointing the backward pass finds the weights gone.
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
    """Fetches blocks that run one after another. In a pass with gradients each block is checkpointed: the graph then
    holds the weights on the device only while the block's backward runs.

    The device's copies are tensors of their own, put in the place of those in host memory. Exchanging `.data` would not
    do: the graph may hold the parameter itself, and would compute with whatever its data is by then.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Replaces the blocks' `forward`; the blocks then hold this object. Adapters attached later stay on the
        device."""
        self.stream = CopyStream(device)
        self.slots = [list(_tensor_slots(block)) for block in blocks]
        self.hosts = [[to_pinned(device, table[name]) for table, name in slots] for slots in self.slots]
        self.pending: dict[int, PendingCopy] = {}
        self.last = 0  # the block that ran last
        for index, block in enumerate(blocks):
            self._install(index, self.hosts[index])
            block.forward = self._forward(index, partial(_class_forward, block))

    def _forward(self, index: int, forward: Forward) -> Forward:
        def run(*inputs: Any, **named: Any) -> Any:
            try:
                self._fetch(index)
                return forward(*inputs, **named)
            finally:  # a recomputation ends by an exception
                self._install(index, self.hosts[index])

        def run_checkpointed(*inputs: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return run(*inputs, **named)
            return checkpoint(run, *inputs, use_reentrant=False, **named)

        return run_checkpointed

    def _fetch(self, index: int) -> None:
        """Wait for a block's copy, and start the next one's in the direction of the pass."""
        following = index + 1 if index > self.last else index - 1
        self.last = index
        for other in set(self.pending) - {index}:
            self.pending.pop(other).wait()  # the pass ended early, or changed its direction
        copy = self.pending.pop(index, None) or self.stream.send(self.hosts[index])
        self._install(index, copy.wait())
        if 0 <= following < len(self.hosts):
            self.pending[following] = self.stream.send(self.hosts[following])

    def _install(self, index: int, tensors: Sequence[Tensor]) -> None:
        for (table, name), tensor in zip(self.slots[index], tensors, strict=True):
            table[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(table[name], nn.Parameter) else tensor


def _class_forward(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Its class's forward, looked up at call time: `enable_recompute` replaces the class."""
    return type(block).forward(block, *inputs, **named)


def _tensor_slots(block: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """(table, name) of each parameter and buffer of the block."""
    for module in block.modules():
        for table in (module._parameters, module._buffers):
            yield from ((table, name) for name, tensor in table.items() if tensor is not None)


def offload_blocks(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> nn.Module:
    """Move a model from host memory to the device, except its blocks, which wait. (`model.to` would move them all.)"""
    waiting = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in waiting:
            tensor.data = tensor.data.to(device)
    BlockOffloader(blocks, device)  # which the blocks hold
    return model
