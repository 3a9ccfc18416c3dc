"""A frozen linear layer and its LoRA as one step of autograd: the low-rank product is added where the layer's output lies,
and its gradient where the layer's input gradient lies. Same numbers as peft's layer but for rounding; four passes over the
activations fewer.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Adapted(torch.autograd.Function):
    """x [N, in] -> x @ weight' + bias + scale * (x @ down') @ up', [N, out]; the layer itself is frozen. weight [out, in],
    down [rank, in], up [out, rank], all of one dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        middle = x @ down.t()
        out = nn.functional.linear(x, weight, bias).addmm_(middle, up.t(), alpha=scale)
        ctx.save_for_backward(x, middle, weight, down, up)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, middle, weight, down, up = ctx.saved_tensors
        of_x, _, _, of_down, of_up, _ = ctx.needs_input_grad
        inner = (grad @ up).mul_(ctx.scale) if of_x or of_down else None
        return (
            (grad @ weight).addmm_(inner, down) if of_x else None,
            None,
            None,
            inner.t() @ x if of_down and inner is not None else None,
            (grad.t() @ middle).mul_(ctx.scale) if of_up else None,
            None,
        )


class FusedLinear(PeftLinear):  # type: ignore[misc]
    """peft's layer, by peft's own way where more is asked than one plain adapter on a plain layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = self.active_adapters
        name = active[0] if len(active) == 1 else ""
        plain = name in self.lora_A and not (args or kwargs or self.disable_adapters or self.merged)
        if not plain or isinstance(self.lora_dropout[name], nn.Dropout):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        weight, bias = self.base_layer.weight, self.base_layer.bias
        down, up = (side[name].weight.to(weight.dtype) for side in (self.lora_A, self.lora_B))
        flat = x.to(weight.dtype).reshape(-1, x.shape[-1])
        fused: Tensor = _Adapted.apply(flat, weight, bias, down, up, self.scaling[name])  # type: ignore[no-untyped-call]
        return fused.view(*x.shape[:-1], -1)


def fuse(model: nn.Module) -> None:
    """Let the adapters of plain linear layers take the short way. Quantised layers keep peft's."""
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) is nn.Linear:
            module.__class__ = FusedLinear
