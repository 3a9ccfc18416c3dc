"""Frozen linear layers that read the same, and their LoRAs, as one step of autograd: each low-rank product is added where its
layer's output lies, all their input gradients where the first one lies, and the ways down are one product. Same numbers as
peft's layers but for rounding; fewer passes over the activations, fewer and larger products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Adapted(torch.autograd.Function):
    """x [N, in] -> of each layer x @ weight' + bias + scale * (x @ down') @ up', [N, out]; the layers themselves are frozen.
    scales: a number per layer; tensors: all weights [out, in], then all biases, downs [rank, in], ups [out, rank], all of one
    dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Sequence[float], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases, downs, ups = _in_four(tensors)
        middle = x @ _joined(downs).t()
        outs = tuple(
            nn.functional.linear(x, weight, bias).addmm_(own, up.t(), alpha=scale)
            for weight, bias, own, up, scale in zip(weights, biases, _each(middle, downs), ups, scales, strict=True)
        )
        ctx.save_for_backward(x, middle, *weights, *downs, *ups)
        ctx.scales = scales
        return outs

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, middle, *rest = ctx.saved_tensors
        count = len(grads)
        weights, downs, ups = rest[:count], rest[count : 2 * count], rest[2 * count :]
        of_x, of_down = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2 + 2 * count : 2 + 3 * count])
        of_ups = ctx.needs_input_grad[2 + 3 * count :]
        inner = found = None
        if of_x or of_down:
            inner = _joined([(g @ up).mul_(scale) for g, up, scale in zip(grads, ups, ctx.scales, strict=True)], 1)
        if of_x and inner is not None:
            found = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                found.addmm_(grad, weight)
            found.addmm_(inner, _joined(downs))
        down = inner.t() @ x if of_down and inner is not None else None
        return (
            found,
            None,
            *[None] * (2 * count),
            *([None] * count if down is None else torch.split(down, [one.shape[0] for one in downs])),
            *(
                (grad.t() @ own).mul_(scale) if need else None
                for grad, own, scale, need in zip(grads, _each(middle, downs), ctx.scales, of_ups, strict=True)
            ),
        )


def _in_four(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    count = len(tensors) // 4
    return [tensors[place : place + count] for place in range(0, len(tensors), count)]


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _each(middle: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
    """[N, sum of ranks] -> [N, rank] of each layer."""
    return torch.split(middle, [one.shape[0] for one in downs], 1)


class FusedLinear(PeftLinear):  # type: ignore[misc]
    """peft's layer, by peft's own way where more is asked than one plain adapter on a plain layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.plain and not (args or kwargs):
            return _fused_forward(x, [self])[0]
        out: Tensor = super().forward(x, *args, **kwargs)
        return out

    @property
    def plain(self) -> bool:
        active = self.active_adapters
        name = active[0] if len(active) == 1 else ""
        if name not in self.lora_A or self.disable_adapters or self.merged:
            return False
        return not isinstance(self.lora_dropout[name], nn.Dropout)


def fused_forward(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each layer makes of x [..., in]: those that are adapted plainly in one step, the others one after the other."""
    plain = [layer for layer in layers if isinstance(layer, FusedLinear) and layer.plain]
    if len({layer.base_layer.weight.dtype for layer in plain}) != 1:
        plain = []
    made = dict(zip(plain, _fused_forward(x, plain), strict=True))
    return [made[layer] if layer in made else layer(x) for layer in layers]


def _fused_forward(x: Tensor, layers: Sequence[Any]) -> Sequence[Tensor]:
    if not layers:
        return []
    named = [(layer, layer.active_adapters[0]) for layer in layers]
    weights, biases = [layer.base_layer.weight for layer in layers], [layer.base_layer.bias for layer in layers]
    downs, ups = (
        [getattr(layer, side)[name].weight.to(weights[0].dtype) for layer, name in named]
        for side in ("lora_A", "lora_B")
    )
    scales = tuple(layer.scaling[name] for layer, name in named)
    flat = x.to(weights[0].dtype).reshape(-1, x.shape[-1])
    found: tuple[Tensor, ...] = _Adapted.apply(flat, scales, *weights, *biases, *downs, *ups)  # type: ignore[no-untyped-call]
    return [out.view(*x.shape[:-1], -1) for out in found]


def fuse_linears(model: nn.Module) -> None:
    """Let the adapters of plain linear layers take the short way. Quantised layers keep peft's."""
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) is nn.Linear:
            module.__class__ = FusedLinear
