"""T5's encoder with half as much kept for the backward pass, where only what goes into it learns: its norms and gated GELU are
made again there (`runner.remaking`), and positions' biases are there once for all blocks. Same numbers as transformers' but for
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.remaking import Recipe, gelu, heads, norm_back, remade


class Scaling(Recipe):
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


class Gating(Recipe):
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


@dataclass(frozen=True)
class LeanT5:
    """`encoder`: a frozen T5EncoderModel. plain: it runs under checkpointing, which sees to what is kept."""

    encoder: Any
    plain: bool

    @classmethod
    def fits(cls, encoder: Any) -> bool:
        """Whether this is the kind of T5 that is written out here, FLUX's."""
        config = encoder.config
        return bool(config.is_gated_act) and config.dense_act_fn == "gelu_new" and not encoder.training

    def states(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, width]."""
        stack = self.encoder.encoder
        x = self.encoder.get_input_embeddings()(ids)
        length = ids.shape[1]
        bias = stack.block[0].layer[0].SelfAttention.compute_bias(length, length, device=x.device)
        bias = bias.to(x.dtype).contiguous()
        for block in stack.block:
            attention, fed = block.layer[0], block.layer[1]
            x = x + self._attended(attention, x, bias)
            x = x + self._fed(fed, x)
        return self._normed(stack.final_layer_norm, x)

    def _normed(self, norm: Any, x: Tensor) -> Tensor:
        return remade(Scaling(norm), x, plain=self.plain)[0]

    def _attended(self, layer: Any, x: Tensor, bias: Tensor) -> Tensor:
        own, read = layer.SelfAttention, self._normed(layer.layer_norm, x)
        q, k, v = (heads(part(read), own.key_value_proj_dim).transpose(1, 2) for part in (own.q, own.k, own.v))
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return own.o(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _fed(self, layer: Any, x: Tensor) -> Tensor:
        own, read = layer.DenseReluDense, self._normed(layer.layer_norm, x)
        gated, _ = remade(Gating(), own.wi_0(read), own.wi_1(read), plain=self.plain)
        return own.wo(gated.to(own.wo.weight.dtype) if own.wo.weight.is_floating_point() else gated)  # type: ignore[no-any-return]
