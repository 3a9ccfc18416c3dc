"""Tensors that are made again in the backward pass rather than kept for it. What elementwise arithmetic makes of what is kept
anyway is cheap, and always is; matrix products are dear, and are if that is asked for (`projected`); attention never is.
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
    """How a tensor is made of `inputs`, cheaply, and what its gradient is. Both compute in fp32 where that matters, whatever
    autocast says: the backward pass knows nothing of it. asks: whether `back` wants something of the making."""

    asks = False

    def make(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensor, and what `back` asks for."""
        raise NotImplementedError

    def back(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], made: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """A gradient for each input; None where none is needed."""
        raise NotImplementedError


class RecomputedTensor:
    """A tensor that is made again in the backward pass, at most once, for all who would have kept it."""

    def __init__(self, recipe: RecomputeOp, inputs: Sequence[Tensor | RecomputedTensor | OutputOf]) -> None:
        """inputs: some may have to be made again themselves."""
        self.recipe = recipe
        self._inputs = [one.detach() if isinstance(one, Tensor) else one for one in inputs]
        self._made: tuple[Tensor, ...] = ()

    @property
    def inputs(self) -> list[Tensor]:
        return [one if isinstance(one, Tensor) else one.tensor for one in self._inputs]

    def again(self) -> tuple[Tensor, ...]:
        self._made = self._made or _make(self.recipe, self.inputs)
        return self._made

    @property
    def tensor(self) -> Tensor:
        return self.again()[0]

    def forget(self) -> None:
        self._inputs, self._made = [], ()


@dataclass(frozen=True)
class OutputOf:
    """One of several tensors that are made again together, and go when nobody has one of them any more."""

    all: RecomputedTensor
    place: int

    @property
    def tensor(self) -> Tensor:
        return self.all.again()[self.place]


def _make(recipe: RecomputeOp, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    kind = inputs[0].device.type
    if not torch.is_autocast_enabled(kind):
        return recipe.make(*inputs)
    with torch.autocast(kind, enabled=False):
        return recipe.make(*inputs)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: RecomputeOp, remade: RecomputedTensor | None, *inputs: Tensor) -> Tensor:
        ctx.remade, ctx.recipe = remade, recipe
        if remade is None:
            ctx.save_for_backward(*inputs)
        return _make(recipe, inputs)[0]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        remade: RecomputedTensor = ctx.remade or RecomputedTensor(ctx.recipe, ctx.saved_tensors)
        made = remade.again()[1:] if remade.recipe.asks else ()
        inputs = remade.inputs
        remade.forget()  # all who kept it have had it: its gradient comes from theirs
        return None, None, *remade.recipe.back(grad, ctx.needs_input_grad[2:], inputs, made)


Lazy = tuple[Tensor, RecomputedTensor | OutputOf | None]


def recompute(recipe: RecomputeOp, *inputs: Tensor | Lazy, plain: bool) -> Lazy:
    """plain: the same numbers, but kept by autograd's usual way, which checkpointing is built upon."""
    reads = [one if isinstance(one, tuple) else (one, None) for one in inputs]
    one = None if plain else RecomputedTensor(recipe, [again or tensor for tensor, again in reads])
    return _Recompute.apply(recipe, one, *(tensor for tensor, _ in reads)), one  # type: ignore[no-untyped-call]


class Projections(RecomputeOp):
    """What frozen layers, with their adapters, make of x, under the autocast of its first time. No `back`: the layers have
    autograd's own."""

    def __init__(self, layers: Sequence[nn.Module], kind: str) -> None:
        self.layers, self.kind = layers, kind
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def make(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(self.kind, self.dtype, enabled=self.dtype is not None):
            return tuple(fused_forward(inputs[0], *self.layers))


def recompute_projections(read: Lazy, *layers: nn.Module, again: bool) -> list[Lazy]:
    """What each layer makes of one tensor. again: of those, too, is kept how they are made."""
    tensor, one = read
    with recompute_on_backward(read):
        made = fused_forward(tensor, *layers)
    if one is None or not again:
        return [(out, None) for out in made]
    every = RecomputedTensor(Projections(layers, tensor.device.type), [one])
    return [(out, OutputOf(every, place)) for place, out in enumerate(made)]


@contextmanager
def recompute_on_backward(*reads: Lazy) -> Iterator[None]:
    """What is computed within keeps how these tensors are made, in place of them and of views of them."""
    places = {tensor.untyped_storage()._cdata: one for tensor, one in reads if one is not None}
    if not places:
        yield
        return

    def pack(tensor: Tensor) -> Any:
        one = places.get(tensor.untyped_storage()._cdata)
        if one is None:
            return tensor.detach()  # an output would keep itself alive
        return one, tensor.size(), tensor.stride(), tensor.storage_offset()

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    one, size, stride, offset = packed
    found: Tensor = one.tensor.as_strided(size, stride, offset)
    return found


def heads(x: Tensor, each: int) -> Tensor:
    """[..., n * each] -> [..., n, each]."""
    return x.reshape(*x.shape[:-1], -1, each)


def norm_back(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> Tensor:
    """The gradient, in fp32, of x * r * weight by x, where r = rsqrt(mean(x ** 2) + eps), over the last dimension."""
    x = x.float()
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, grad = x * r, grad * weight
    along = (grad * normed).mean(-1, keepdim=True)
    return grad.addcmul_(normed, along, value=-1).mul_(r)


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """By tanh. In fp32 on a CPU as x * sigmoid(...), which is the same: torch's kernel takes half as long again there (2.13)."""
    out = torch.empty_like(x) if out is None else out
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)  # type: ignore[no-any-return]
    slope = math.sqrt(8 / math.pi)
    torch.addcmul(x.new_tensor(slope), x, x, value=0.044715 * slope, out=out)
    return out.mul_(x).sigmoid_().mul_(x)
