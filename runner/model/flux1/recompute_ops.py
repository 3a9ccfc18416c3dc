"""What FLUX.1's blocks compute again in the backward pass: modulation, rotated norms, GELU, concatenations.

Shapes: B batch, T text tokens, I image tokens, N = T + I, d width, heads of D numbers (d = heads * D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runner.model.recomputation import RecomputeOp, gelu, rms_norm_backward, split_heads


@dataclass(frozen=True)
class Modulate(RecomputeOp):
    """x [B, N, d], shift and scale [B, d] -> LayerNorm(x) * (1 + scale) + shift."""

    eps: float
    uses_intermediates = True

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, shift, scale = inputs
        normed, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, self.eps)
        torch.addcmul(shift[:, None].float(), normed, 1 + scale[:, None].float(), out=normed)
        return normed.to(x.dtype), mean, rstd

    def gradients(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], intermediates: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        (x, shift, scale), (mean, rstd) = inputs, intermediates
        grad = grad.float()
        of_x = of_shift = of_scale = None
        if needed[0]:
            of_normed = grad * (1 + scale[:, None].float())
            of_x = torch.ops.aten.native_layer_norm_backward(
                of_normed, x.float(), x.shape[-1:], mean, rstd, None, None, [True, False, False]
            )[0].to(x.dtype)
        if needed[1]:
            of_shift = grad.sum(1).to(shift.dtype)
        if needed[2]:
            of_scale = (x.float() - mean).mul_(rstd).mul_(grad).sum(1).to(scale.dtype)
        return of_x, of_shift, of_scale


class RotaryNorm(RecomputeOp):
    """For each norm an x [B, N_i, heads * D] -> their RMS norms over D, joined along the tokens and rotated: [B, N,
    heads, D].

    pe: cosines + i sines [N, 1, D / 2].
    """

    def __init__(self, pe: Tensor, *norms: nn.RMSNorm) -> None:
        """Keeps the norms' weights themselves: in the backward pass those of an offloaded block may have left it."""
        self.pe = pe
        self.norms = [(norm.weight.float(), norm.eps or torch.finfo(torch.float32).eps) for norm in norms]

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        parts = [
            nn.functional.rms_norm(split_heads(x, len(weight)).float(), weight.shape, weight, eps)
            for x, (weight, eps) in zip(inputs, self.norms, strict=True)
        ]
        normed = parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # [B, N, heads, D], fp32
        torch.view_as_complex(split_heads(normed, 2)).mul_(self.pe)
        return (normed.to(inputs[0].dtype),)

    def gradients(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], intermediates: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        rotated_back = torch.view_as_complex(split_heads(grad.float().contiguous(), 2)) * self.pe.conj()
        of_normed = torch.view_as_real(rotated_back).flatten(-2)  # [B, N, heads, D]
        parts = torch.split(of_normed, [x.shape[1] for x in inputs], dim=1)
        return [
            rms_norm_backward(split_heads(x, len(weight)), weight, eps, part).flatten(-2).to(x.dtype) if need else None
            for x, (weight, eps), part, need in zip(inputs, self.norms, parts, needed, strict=True)
        ]


class Gelu(RecomputeOp):
    """GELU's tanh approximation."""

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (gelu(inputs[0]),)

    def gradients(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], intermediates: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        return (torch.ops.aten.gelu_backward(grad, inputs[0], approximate="tanh"),)


class ConcatGelu(RecomputeOp):
    """attn [B, N, d] and mlp [B, N, 4 * d] -> [attn, GELU(mlp)], [B, N, 5 * d]: what a single block's last layer
    reads."""

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        attn, mlp = inputs
        width = attn.shape[-1]
        out = attn.new_empty(*attn.shape[:-1], width + mlp.shape[-1])
        out[..., :width] = attn
        gelu(mlp, out[..., width:])
        return (out,)

    def gradients(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], intermediates: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        of_attn, of_gelu = torch.split(grad, [x.shape[-1] for x in inputs], dim=-1)
        return (
            of_attn if needed[0] else None,
            torch.ops.aten.gelu_backward(of_gelu, inputs[1], approximate="tanh") if needed[1] else None,
        )


class Concat(RecomputeOp):
    """txt [B, T, d] and img [B, I, d] -> [B, N, d]."""

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(inputs, dim=1),)

    def gradients(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], intermediates: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        parts = torch.split(grad, [x.shape[1] for x in inputs], dim=1)
        return [part if need else None for part, need in zip(parts, needed, strict=True)]
