"""T5's blocks with half as much kept for the backward pass, where only what goes into them learns: norms and gated GELU are made
again there (`runner.model.recomputation`), and positions' biases are there once for all blocks. Same numbers as transformers' but for
rounding; without gradients they go on as transformers' own.
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
    heads,
    norm_back,
    recompute,
    recompute_on_backward,
    recompute_projections,
)


class RMSNormOp(RecomputeOp):
    """x [B, T, d] -> its RMS norm over d, in the dtype of T5's weight."""

    def __init__(self, norm: Any) -> None:
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def make(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x = inputs[0].float()
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (normed.to(self.weight.dtype).mul_(self.weight),)

    def back(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], made: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        return (norm_back(inputs[0], self.weight.float(), self.eps, grad.float()).to(inputs[0].dtype),)


class GatedGelu(RecomputeOp):
    """a, b [B, T, inner] -> gelu(a) * b, the GELU by tanh."""

    def make(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (gelu(inputs[0]).mul_(inputs[1]),)

    def back(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], made: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        a, b = inputs
        return (
            torch.ops.aten.gelu_backward(grad * b, a, approximate="tanh"),
            gelu(a).mul_(grad),
        )


class RecomputeT5Block(T5Block):  # type: ignore[misc]
    """plain: whether it keeps what others do, since it runs under checkpointing; again: whether it makes again what its layers
    make of what they read together."""

    plain = False
    again = False

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None,
        *rest: Any, **named: Any,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        """[B, T, d], and the biases of positions [1, heads, T, T], which the first block makes for all."""
        if attention_mask is not None or self.training or not torch.is_grad_enabled():
            stock: tuple[Tensor, Tensor, None] = super().forward(
                hidden_states, attention_mask, position_bias, *rest, **named
            )
            return stock
        x, length = hidden_states, hidden_states.shape[1]
        if position_bias is None:
            position_bias = self.layer[0].SelfAttention.compute_bias(length, length, device=x.device).contiguous()
        x = clamped(x + self._attended(x, position_bias))
        return clamped(x + self._fed(x)), position_bias, None

    def _attended(self, x: Tensor, bias: Tensor) -> Tensor:
        own = self.layer[0].SelfAttention
        reads = recompute_projections(self._normed(self.layer[0], x), own.q, own.k, own.v, again=self.again)
        q, k, v = (heads(tensor, own.key_value_proj_dim).transpose(1, 2) for tensor, _ in reads)
        with recompute_on_backward(*reads):
            found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        out: Tensor = own.o(found.transpose(1, 2).flatten(2))
        return out

    def _fed(self, x: Tensor) -> Tensor:
        own = self.layer[-1].DenseReluDense
        sides = recompute_projections(self._normed(self.layer[-1], x), own.wi_0, own.wi_1, again=self.again)
        gated, _ = recompute(GatedGelu(), *sides, plain=self.plain)
        kept = own.wo.weight.dtype  # in fp32 by some
        out: Tensor = own.wo(gated.to(kept) if kept.is_floating_point else gated)
        return out

    def _normed(self, layer: Any, x: Tensor) -> Lazy:
        return recompute(RMSNormOp(layer.layer_norm), x, plain=self.plain)


def clamped(x: Tensor) -> Tensor:
    """T5 overflows in fp16."""
    most = torch.finfo(x.dtype).max
    return x if x.dtype != torch.float16 else x.clamp(1000 - most, most - 1000)


def enable_recompute(encoder: Any, *, plain: bool, again: bool = False) -> None:
    """Let a T5EncoderModel's blocks keep less, if they are of the kind that FLUX has. plain, again: see `LeanT5Block`."""
    if not encoder.config.is_gated_act or encoder.config.dense_act_fn != "gelu_new":
        return
    for block in encoder.encoder.block:
        if type(block) is T5Block:
            block.__class__ = RecomputeT5Block
            block.plain, block.again = plain, again
