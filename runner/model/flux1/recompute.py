"""FLUX's blocks with half as much kept for the backward pass: norm and modulation, GELU, the turning of queries and keys are
made again there (`runner.model.recomputation`). Same numbers as diffusers' blocks but for rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from runner.model.flux1.transformer import blocks_of
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

Table = tuple[Tensor, Tensor]  # cosines and sines [N, D] of each token's angles, every angle twice side by side
LIMIT = 65504  # of fp16, where diffusers clips the residual stream too


# ---- what is made again ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Modulation(RecomputeOp):
    """x [B, N, d], shift and scale [B, d] -> LayerNorm(x) * (1 + scale) + shift."""

    eps: float
    asks = True

    def make(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, shift, scale = inputs
        normed, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, self.eps)
        torch.addcmul(shift[:, None].float(), normed, 1 + scale[:, None].float(), out=normed)
        return normed.to(x.dtype), mean, rstd

    def back(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], made: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        (x, shift, scale), (mean, rstd) = inputs, made
        grad, found = grad.float(), list[Tensor | None]((None, None, None))
        if needed[0]:
            through, shape = grad * (1 + scale[:, None].float()), x.shape[-1:]
            found[0] = torch.ops.aten.native_layer_norm_backward(
                through, x.float(), shape, mean, rstd, None, None, [True, False, False]
            )[0].to(x.dtype)
        if needed[1]:
            found[1] = grad.sum(1).to(shift.dtype)
        if needed[2]:
            found[2] = (x.float() - mean).mul_(rstd).mul_(grad).sum(1).to(scale.dtype)
        return found


class RotaryNorm(RecomputeOp):
    """For each norm an x [B, N_i, heads * D] -> their RMS norms over D, one behind the other, turned by angle: [B, N, heads, D].
    turn: cosines + i sines [N, 1, D / 2]."""

    def __init__(self, turn: Tensor, *norms: nn.RMSNorm) -> None:
        """The norms' weights are held: those of an offloaded block may be gone from it in the backward pass."""
        self.turn = turn
        self.norms = [(norm.weight.float(), norm.eps or torch.finfo(torch.float32).eps) for norm in norms]

    def make(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        made = [
            nn.functional.rms_norm(heads(x, len(weight)).float(), weight.shape, weight, eps)
            for x, (weight, eps) in zip(inputs, self.norms, strict=True)
        ]
        normed = made[0] if len(made) == 1 else torch.cat(made, 1)
        torch.view_as_complex(heads(normed, 2)).mul_(self.turn)
        return (normed.to(inputs[0].dtype),)

    def back(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], made: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        turned = torch.view_as_complex(heads(grad.float().contiguous(), 2)) * self.turn.conj()
        grad = torch.view_as_real(turned).flatten(-2)
        grads = torch.split(grad, [x.shape[1] for x in inputs], dim=1)
        return [
            norm_back(heads(x, len(weight)), weight, eps, one).flatten(-2).to(x.dtype) if need else None
            for x, (weight, eps), one, need in zip(inputs, self.norms, grads, needed, strict=True)
        ]


class Activation(RecomputeOp):
    """GELU by tanh."""

    def make(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (gelu(inputs[0]),)

    def back(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], made: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        return (torch.ops.aten.gelu_backward(grad, inputs[0], approximate="tanh"),)


class ConcatGelu(RecomputeOp):
    """Attention's output [B, N, d] and the GELU of an MLP's [B, N, inner], side by side: what a single block's last layer reads."""

    def make(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        attended, inner = inputs
        width = attended.shape[-1]
        out = attended.new_empty(*attended.shape[:-1], width + inner.shape[-1])
        out[..., :width] = attended
        gelu(inner, out[..., width:])
        return (out,)

    def back(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], made: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        first, second = torch.split(grad, [one.shape[-1] for one in inputs], dim=-1)
        return (
            first if needed[0] else None,
            torch.ops.aten.gelu_backward(second, inputs[1], approximate="tanh") if needed[1] else None,
        )


class Concat(RecomputeOp):
    """Text's and image's [B, N_i, d], one behind the other."""

    def make(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(inputs, dim=1),)

    def back(
        self, grad: Tensor, needed: Sequence[bool], inputs: Sequence[Tensor], made: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        grads = torch.split(grad, [one.shape[1] for one in inputs], dim=1)
        return [one if need else None for one, need in zip(grads, needed, strict=True)]


# ---- the blocks ------------------------------------------------------------------------------------------------------


def rotary_norm(table: Table) -> Tensor:
    cos, sin = table
    return torch.complex(cos[:, None, ::2].float(), sin[:, None, ::2].float())


def attend(attn: Any, queries: Lazy, keys: Lazy, values: Lazy) -> Tensor:
    """Queries and keys [B, N, heads, D], values [B, N, heads * D] -> [B, N, heads * D]."""
    read = heads(values[0], attn.head_dim)
    with recompute_on_backward(queries, keys, values):
        found: Tensor = dispatch_attention_fn(queries[0], keys[0], read, backend=attn.processor._attention_backend)
    return found.flatten(2, 3).to(read.dtype)


def gated_residual(x: Tensor, gate: Tensor, what: Tensor) -> Tensor:
    """x + gate * what."""
    out = torch.addcmul(x, gate[:, None], what)
    return out.clip(-LIMIT, LIMIT) if out.dtype == torch.float16 else out


class RecomputeBlock:
    """In front of a block of diffusers'. plain: whether it keeps what others do, since it runs under checkpointing; again:
    whether it makes again what its layers make of what they read together."""

    plain = False
    again = False

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Table | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        img, txt = hidden_states, encoder_hidden_states
        if image_rotary_emb is None or joint_attention_kwargs or not torch.is_grad_enabled():
            own: Any = super()
            stock: tuple[Tensor, Tensor] = own.forward(img, txt, temb, image_rotary_emb, joint_attention_kwargs)
            return stock
        return self.lean(img, txt, temb, image_rotary_emb)

    def lean(self, img: Tensor, txt: Tensor, temb: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """img [B, I, d], txt [B, T, d], temb [B, d] -> txt, img."""
        raise NotImplementedError


class RecomputeDoubleBlock(RecomputeBlock, FluxTransformerBlock):  # type: ignore[misc]
    def lean(self, img: Tensor, txt: Tensor, temb: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        attn = self.attn
        of_img, of_txt = (norm.linear(norm.silu(temb)).chunk(6, 1) for norm in (self.norm1, self.norm1_context))
        read = recompute(Modulation(self.norm1.norm.eps), img, *of_img[:2], plain=self.plain)
        q, k, v = recompute_projections(read, attn.to_q, attn.to_k, attn.to_v, again=self.again)
        read = recompute(Modulation(self.norm1_context.norm.eps), txt, *of_txt[:2], plain=self.plain)
        txt_q, txt_k, txt_v = recompute_projections(
            read, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, again=self.again
        )
        turn, length = rotary_norm(table), txt.shape[1]
        queries = recompute(RotaryNorm(turn, attn.norm_added_q, attn.norm_q), txt_q, q, plain=self.plain)
        keys = recompute(RotaryNorm(turn, attn.norm_added_k, attn.norm_k), txt_k, k, plain=self.plain)
        attended = attend(attn, queries, keys, recompute(Concat(), txt_v, v, plain=self.plain))
        img = gated_residual(img, of_img[2], attn.to_out[0](attended[:, length:]))
        txt = gated_residual(txt, of_txt[2], attn.to_add_out(attended[:, :length]))
        img = self._fed(img, self.norm2, self.ff, of_img)
        return self._fed(txt, self.norm2_context, self.ff_context, of_txt), img

    def _fed(self, x: Tensor, norm: nn.LayerNorm, ff: Any, modulated: Sequence[Tensor]) -> Tensor:
        """One stream's MLP, added. modulated: shift, scale, gate of attention's, then the MLP's."""
        read = recompute(Modulation(norm.eps), x, *modulated[3:5], plain=self.plain)
        [inner] = recompute_projections(read, ff.net[0].proj, again=self.again)
        read = recompute(Activation(), inner, plain=self.plain)
        with recompute_on_backward(read):
            out = ff.net[2](read[0])
        return gated_residual(x, modulated[5], out)


class RecomputeSingleBlock(RecomputeBlock, FluxSingleTransformerBlock):  # type: ignore[misc]
    last = False  # of the model, which goes on with the image alone: the text is then only what others attend to

    def lean(self, img: Tensor, txt: Tensor, temb: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        attn = self.attn
        x, turn, length = torch.cat([txt, img], dim=1), rotary_norm(table), txt.shape[1]
        first = length if self.last else 0  # of the tokens that anything comes of
        shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, 1)
        read = recompute(Modulation(self.norm.norm.eps), x, shift, scale, plain=self.plain)
        if first:
            own, one = read
            inner, q = recompute_projections((own[:, first:], one), self.proj_mlp, attn.to_q, again=False)
            k, v = recompute_projections(read, attn.to_k, attn.to_v, again=False)
        else:
            inner, q, k, v = recompute_projections(
                read, self.proj_mlp, attn.to_q, attn.to_k, attn.to_v, again=self.again
            )
        queries = recompute(RotaryNorm(turn[first:], attn.norm_q), q, plain=self.plain)
        keys = recompute(RotaryNorm(turn, attn.norm_k), k, plain=self.plain)
        attended = attend(attn, queries, keys, v)
        read = recompute(ConcatGelu(), attended, inner, plain=self.plain)
        with recompute_on_backward(read):
            out = self.proj_out(read[0])
        out = gated_residual(x[:, first:], gate, out)
        return (txt, out) if self.last else (out[:, :length], out[:, length:])


def enable_recompute(transformer: Any, *, plain: Collection[nn.Module] = (), again: bool = False) -> None:
    """Let its blocks keep less; the plain ones as much as ever, for checkpointing, which keeps nothing of it. again: still
    less, for more time, but for the last block: when its turn comes in the backward pass all would be there anyway. Without
    gradients, as for pictures, they go on as diffusers' own."""
    lean: dict[type, Any] = {
        FluxTransformerBlock: RecomputeDoubleBlock,
        FluxSingleTransformerBlock: RecomputeSingleBlock,
    }
    block: Any
    twice = {id(block) for block in plain}
    for block in blocks_of(transformer):
        if type(block) in lean:
            block.__class__ = lean[type(block)]
            block.plain, block.again = id(block) in twice, again
    *_, last = blocks_of(transformer)
    if isinstance(last, RecomputeBlock):
        last.again = False
    if isinstance(last, RecomputeSingleBlock):
        last.last = True


def disable_recompute(transformer: Any) -> None:
    """diffusers' own again."""
    stock: dict[type, Any] = {
        RecomputeDoubleBlock: FluxTransformerBlock,
        RecomputeSingleBlock: FluxSingleTransformerBlock,
    }
    for block in blocks_of(transformer):
        if type(block) in stock:
            block.__class__ = stock[type(block)]
            for name in ("plain", "again", "last"):
                block.__dict__.pop(name, None)
