"""Tensors that are computed again in the backward pass instead of being kept for it (selective activation
recomputation).

Three rules decide what is recomputed. Elementwise results of tensors that are kept anyway are cheap, so they always
are. Matrix products are expensive, so they are only where asked for (`project`). Attention never is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from runner.model.fused_lora import fused_forward


class RecomputeOp:
    """A cheap function of `inputs`, with its gradient written out.

    Both compute in fp32 where that matters, whatever autocast says: autocast is off in the backward pass.
    uses_intermediates: whether `gradients` needs more of `compute` than its inputs.
    """

    uses_intermediates = False

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """(the output, intermediates for `gradients`)."""
        raise NotImplementedError

    def gradients(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], intermediates: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """grad: of the output. A gradient for each input, None where none is needed."""
        raise NotImplementedError


class RecomputedTensor:
    """An op's output that is computed again in the backward pass, once, and shared by everything that would have kept
    it."""

    def __init__(self, op: RecomputeOp, inputs: Sequence[Tensor | RecomputedTensor | OutputOf]) -> None:
        """inputs: tensors, or others that are recomputed too."""
        self.op = op
        self._inputs = [source.detach() if isinstance(source, Tensor) else source for source in inputs]
        self._outputs: tuple[Tensor, ...] = ()

    @property
    def inputs(self) -> list[Tensor]:
        return [source if isinstance(source, Tensor) else source.tensor for source in self._inputs]

    def outputs(self) -> tuple[Tensor, ...]:
        """All that the op computes; only the first call computes it."""
        self._outputs = self._outputs or _compute(self.op, self.inputs)
        return self._outputs

    @property
    def tensor(self) -> Tensor:
        return self.outputs()[0]

    def free(self) -> None:
        self._inputs, self._outputs = [], ()


@dataclass(frozen=True)
class OutputOf:
    """One of several outputs that are recomputed together; their memory goes with the last of them."""

    source: RecomputedTensor
    index: int

    @property
    def tensor(self) -> Tensor:
        return self.source.outputs()[self.index]


# A tensor, and how to compute it again; None: it is kept.
Lazy = tuple[Tensor, RecomputedTensor | OutputOf | None]


def _compute(op: RecomputeOp, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    device_type = inputs[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return op.compute(*inputs)
    with torch.autocast(device_type, enabled=False):
        return op.compute(*inputs)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: RecomputeOp, recomputed: RecomputedTensor | None, *inputs: Tensor) -> Tensor:
        ctx.recomputed, ctx.op = recomputed, op
        if recomputed is None:
            ctx.save_for_backward(*inputs)
        return _compute(op, inputs)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recomputed: RecomputedTensor = ctx.recomputed or RecomputedTensor(ctx.op, ctx.saved_tensors)
        op = recomputed.op
        intermediates = recomputed.outputs()[1:] if op.uses_intermediates else ()
        inputs = recomputed.inputs
        recomputed.free()  # all consumers' backward passes have run
        return None, None, *op.gradients(grad, ctx.needs_input_grad[2:], inputs, intermediates)


def recompute(op: RecomputeOp, *inputs: Tensor | Lazy, save: bool) -> Lazy:
    """The op's output. save: the same numbers, but kept in autograd's usual way, which gradient checkpointing builds
    upon."""
    reads = [read if isinstance(read, tuple) else (read, None) for read in inputs]
    recomputed = None if save else RecomputedTensor(op, [source or tensor for tensor, source in reads])
    return _Recompute.apply(op, recomputed, *(tensor for tensor, _ in reads)), recomputed  # type: ignore[no-untyped-call]


class Projections(RecomputeOp):
    """What frozen layers, with their adapters, compute of x, under the autocast of the forward pass. It has no
    `gradients`: the layers have autograd's own."""

    def __init__(self, layers: Sequence[nn.Module], device_type: str) -> None:
        self.layers, self.device_type = layers, device_type
        self.dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            return tuple(fused_forward(inputs[0], *self.layers))


def project(x: Lazy, *layers: nn.Module, recompute: bool) -> list[Lazy]:
    """What each linear layer computes of x. recompute: the outputs, too, are computed again in the backward pass."""
    tensor, source = x
    with recompute_on_backward(x):
        outputs = fused_forward(tensor, *layers)
    if source is None or not recompute:
        return [(output, None) for output in outputs]
    together = RecomputedTensor(Projections(layers, tensor.device.type), [source])
    return [(output, OutputOf(together, index)) for index, output in enumerate(outputs)]


@contextmanager
def recompute_on_backward(*reads: Lazy) -> Iterator[None]:
    """Within, autograd keeps how these tensors (and views of them) are recomputed instead of the tensors themselves."""
    sources = {tensor.untyped_storage()._cdata: source for tensor, source in reads if source is not None}
    if not sources:
        yield
        return

    def pack(tensor: Tensor) -> Any:
        source = sources.get(tensor.untyped_storage()._cdata)
        if source is None:
            return tensor.detach()  # an output would keep itself alive
        return source, tensor.size(), tensor.stride(), tensor.storage_offset()

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    source, size, stride, offset = packed
    tensor: Tensor = source.tensor.as_strided(size, stride, offset)
    return tensor


# ---- what several ops share ------------------------------------------------------------------------------------------


def split_heads(x: Tensor, width: int) -> Tensor:
    """[..., heads * width] -> [..., heads, width]."""
    return x.reshape(*x.shape[:-1], -1, width)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> Tensor:
    """The gradient by x, in fp32, of x * r * weight with r = rsqrt(mean(x ** 2) + eps), over the last dimension.

    With n = x * r and g = grad * weight it is r * (g - n * mean(g * n)).
    """
    x = x.float()
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, grad = x * r, grad * weight
    along = (grad * normed).mean(-1, keepdim=True)
    return grad.addcmul_(normed, along, value=-1).mul_(r)


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """GELU's tanh approximation. In fp32 on a CPU it is computed as x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), which
    is equal: torch's kernel takes half as long again there (torch 2.13)."""
    out = torch.empty_like(x) if out is None else out
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)  # type: ignore[no-any-return]
    slope = math.sqrt(8 / math.pi)
    torch.addcmul(x.new_tensor(slope), x, x, value=0.044715 * slope, out=out)
    return out.mul_(x).sigmoid_().mul_(x)
