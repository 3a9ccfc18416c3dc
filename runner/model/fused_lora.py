"""Frozen linear layers that read the same input, with their LoRAs, as one autograd function.

Each low-rank product is added into its layer's output, all input gradients into one buffer, and the layers' lora_A
products are one matrix product. Same numbers as peft's layers but for rounding; fewer passes over the activations,
fewer and larger products.

Shapes: N rows of the flattened input, `in` and `out` features of a layer, rank r; R is the sum of the layers' ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _FusedLora(torch.autograd.Function):
    """x [N, in] -> for each layer x @ W' + bias + scale * (x @ A') @ B', [N, out]. W and bias are frozen.

    scales: one per layer. tensors: all W [out, in], then all biases, all A [r, in], all B [out, r]; all of one dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Sequence[float], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases, lora_as, lora_bs = _quarters(tensors)
        lows = x @ _concat(lora_as).t()  # [N, R]
        outs = tuple(
            nn.functional.linear(x, weight, bias).addmm_(low, lora_b.t(), alpha=scale)
            for weight, bias, low, lora_b, scale in zip(
                weights, biases, _split(lows, lora_as), lora_bs, scales, strict=True
            )
        )
        ctx.save_for_backward(x, lows, *weights, *lora_as, *lora_bs)
        ctx.scales = scales
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lows, *rest = ctx.saved_tensors
        count = len(grads)
        weights, lora_as, lora_bs = rest[:count], rest[count : 2 * count], rest[2 * count :]
        need_x, need_a = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2 + 2 * count : 2 + 3 * count])
        need_b = ctx.needs_input_grad[2 + 3 * count :]
        grad_lows = grad_x = grad_a = None
        if need_x or need_a:
            grad_lows = _concat(
                [(grad @ lora_b).mul_(scale) for grad, lora_b, scale in zip(grads, lora_bs, ctx.scales, strict=True)], 1
            )  # [N, R]
        if need_x and grad_lows is not None:
            grad_x = grads[0] @ weights[0]  # [N, in]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_x.addmm_(grad, weight)
            grad_x.addmm_(grad_lows, _concat(lora_as))
        if need_a and grad_lows is not None:
            grad_a = grad_lows.t() @ x  # [R, in]
        return (
            grad_x,
            None,
            *[None] * (2 * count),
            *([None] * count if grad_a is None else torch.split(grad_a, [lora_a.shape[0] for lora_a in lora_as])),
            *(
                (grad.t() @ low).mul_(scale) if need else None
                for grad, low, scale, need in zip(grads, _split(lows, lora_as), ctx.scales, need_b, strict=True)
            ),
        )


def _quarters(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    count = len(tensors) // 4
    return [tensors[start : start + count] for start in range(0, len(tensors), count)]


def _concat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.cat without a copy where there is only one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _split(lows: Tensor, lora_as: Sequence[Tensor]) -> Sequence[Tensor]:
    """[N, R] -> [N, r] of each layer."""
    return torch.split(lows, [lora_a.shape[0] for lora_a in lora_as], 1)


class FusedLinear(PeftLinear):  # type: ignore[misc]
    """peft's adapted linear layer. Where it has one active adapter without dropout it is computed here, else peft's
    way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.fusable and not (args or kwargs):
            return _fused_forward(x, [self])[0]
        out: Tensor = super().forward(x, *args, **kwargs)
        return out

    @property
    def fusable(self) -> bool:
        """One active adapter that is neither merged nor switched off, without dropout."""
        active = self.active_adapters
        name = active[0] if len(active) == 1 else ""
        if name not in self.lora_A or self.disable_adapters or self.merged:
            return False
        return not isinstance(self.lora_dropout[name], nn.Dropout)


def fused_forward(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """x [..., in] -> [..., out] of each layer: the fusable ones in one step, the others one after the other."""
    fusable = [layer for layer in layers if isinstance(layer, FusedLinear) and layer.fusable]
    if len({layer.base_layer.weight.dtype for layer in fusable}) != 1:
        fusable = []
    outputs = dict(zip(fusable, _fused_forward(x, fusable), strict=True))
    return [outputs[layer] if layer in outputs else layer(x) for layer in layers]


def _fused_forward(x: Tensor, layers: Sequence[Any]) -> Sequence[Tensor]:
    if not layers:
        return []
    adapters = [(layer, layer.active_adapters[0]) for layer in layers]
    weights, biases = [layer.base_layer.weight for layer in layers], [layer.base_layer.bias for layer in layers]
    dtype = weights[0].dtype
    lora_as = [layer.lora_A[name].weight.to(dtype) for layer, name in adapters]
    lora_bs = [layer.lora_B[name].weight.to(dtype) for layer, name in adapters]
    scales = tuple(layer.scaling[name] for layer, name in adapters)
    flat = x.to(dtype).reshape(-1, x.shape[-1])  # [N, in]
    outs: tuple[Tensor, ...] = _FusedLora.apply(flat, scales, *weights, *biases, *lora_as, *lora_bs)  # type: ignore[no-untyped-call]
    return [out.view(*x.shape[:-1], -1) for out in outs]


def fuse_linears(model: nn.Module) -> None:
    """Turn the adapted plain linear layers into `FusedLinear`. Quantized layers stay peft's."""
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) is nn.Linear:
            module.__class__ = FusedLinear
