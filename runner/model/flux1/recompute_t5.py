"""T5's blocks with half as much kept for the backward pass, where only their input learns (token rows).

Norms and the gated GELU are computed again there (`runner.model.recomputation`), and the position biases are kept once
for all blocks. Same numbers as transformers' blocks but for rounding; without gradients they run as transformers' own.

Shapes: B batch, T text tokens, d width, heads of D numbers, F width of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Block

from runner.model.recomputation import (
    Lazy,
    RecomputeOp,
    gelu,
    project,
    recompute,
    recompute_on_backward,
    rms_norm_backward,
    split_heads,
)


class RMSNormOp(RecomputeOp):
    """x [B, T, d] -> its RMS norm over d, in the dtype of T5's weight."""

    def __init__(self, norm: Any) -> None:
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x = inputs[0].float()
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (normed.to(self.weight.dtype).mul_(self.weight),)

    def gradients(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], intermediates: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        [x] = inputs
        return (rms_norm_backward(x, self.weight.float(), self.eps, grad.float()).to(x.dtype),)


class GatedGelu(RecomputeOp):
    """a, b [B, T, F] -> GELU(a) * b, in GELU's tanh approximation."""

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (gelu(inputs[0]).mul_(inputs[1]),)

    def gradients(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], intermediates: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        a, b = inputs
        return (
            torch.ops.aten.gelu_backward(grad * b, a, approximate="tanh"),
            gelu(a).mul_(grad),
        )


class RecomputeT5Block(T5Block):  # type: ignore[misc]
    """save_activations: keep what autograd usually keeps, since gradient checkpointing runs the encoder again anyway;
    recompute_projections: compute again also what its linear layers give."""

    save_activations = False
    recompute_projections = False

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None,
        *rest: Any, **named: Any,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        """x [B, T, d] and position biases [1, heads, T, T], which the first block computes for all of them."""
        if attention_mask is not None or self.training or not torch.is_grad_enabled():
            stock: tuple[Tensor, Tensor, None] = super().forward(
                hidden_states, attention_mask, position_bias, *rest, **named
            )
            return stock
        x, length = hidden_states, hidden_states.shape[1]
        if position_bias is None:
            position_bias = self.layer[0].SelfAttention.compute_bias(length, length, device=x.device).contiguous()
        x = clamp_fp16(x + self._attention(x, position_bias))
        return clamp_fp16(x + self._feed_forward(x)), position_bias, None

    def _attention(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, T, d], bias [1, heads, T, T] -> [B, T, d]."""
        attn = self.layer[0].SelfAttention
        qkv = self._project(self._norm(self.layer[0], x), attn.q, attn.k, attn.v)  # [B, T, heads * D] each
        q, k, v = (split_heads(tensor, attn.key_value_proj_dim).transpose(1, 2) for tensor, _ in qkv)
        with recompute_on_backward(*qkv):
            attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        out: Tensor = attn.o(attended.transpose(1, 2).flatten(2))
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        ff = self.layer[-1].DenseReluDense
        halves = self._project(self._norm(self.layer[-1], x), ff.wi_0, ff.wi_1)  # [B, T, F] each
        gated, _ = recompute(GatedGelu(), *halves, save=self.save_activations)
        dtype = ff.wo.weight.dtype  # fp32 in transformers' fp16 T5
        out: Tensor = ff.wo(gated.to(dtype) if dtype.is_floating_point else gated)
        return out

    def _norm(self, layer: Any, x: Tensor) -> Lazy:
        return recompute(RMSNormOp(layer.layer_norm), x, save=self.save_activations)

    def _project(self, x: Lazy, *layers: nn.Module) -> list[Lazy]:
        return project(x, *layers, recompute=self.recompute_projections)


def clamp_fp16(x: Tensor) -> Tensor:
    """T5 overflows in fp16; other dtypes pass unchanged."""
    limit = torch.finfo(x.dtype).max - 1000
    return x if x.dtype != torch.float16 else x.clamp(-limit, limit)


def enable_recompute(encoder: Any, *, save_activations: bool, recompute_projections: bool = False) -> None:
    """Let a T5EncoderModel's blocks keep less for the backward pass; see `RecomputeT5Block`. Nothing changes in a T5
    whose feed-forward layers are of another kind than FLUX.1's."""
    if not encoder.config.is_gated_act or encoder.config.dense_act_fn != "gelu_new":
        return
    for block in encoder.encoder.block:
        if type(block) is T5Block:
            block.__class__ = RecomputeT5Block
            block.save_activations, block.recompute_projections = save_activations, recompute_projections
