"""FLUX.1's blocks with half as much kept for the backward pass, named as in BFL's flux/modules/layers.py.

Norm with modulation, GELU, and the rotated queries and keys are computed again there (`runner.model.recomputation`).
Same numbers as diffusers' blocks but for rounding.

Shapes: B batch, T text tokens, I image tokens, N = T + I, d width, heads of D numbers (d = heads * D).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from runner.model.flux1.recompute_ops import Concat, ConcatGelu, Gelu, Modulate, RotaryNorm
from runner.model.flux1.transformer import blocks_of
from runner.model.recomputation import Lazy, project, recompute, recompute_on_backward, split_heads

RotaryTable = tuple[Tensor, Tensor]  # cosines and sines [N, D] of each token's angles, every angle twice side by side
FP16_LIMIT = 65504  # where diffusers, too, clips the residual stream in fp16


class Mod(NamedTuple):
    """What modulates one layer's input and output: [B, d] each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulation(norm: Any, vec: Tensor) -> list[Mod]:
    """Of one of diffusers' modulated norms: two of them (attention, MLP) in a double block, one in a single block."""
    chunks = norm.linear(norm.silu(vec)).split(norm.norm.normalized_shape[-1], 1)
    return [Mod(*chunks[start : start + 3]) for start in range(0, len(chunks), 3)]


def complex_pe(table: RotaryTable) -> Tensor:
    """cosines + i sines [N, 1, D / 2]: multiplying by them rotates pairs of numbers."""
    cos, sin = table
    return torch.complex(cos[:, None, ::2].float(), sin[:, None, ::2].float())


def attention(attn: Any, q: Lazy, k: Lazy, v: Lazy) -> Tensor:
    """q, k [B, N, heads, D], v [B, N, heads * D] -> [B, N, heads * D]."""
    values = split_heads(v[0], attn.head_dim)
    with recompute_on_backward(q, k, v):
        out: Tensor = dispatch_attention_fn(q[0], k[0], values, backend=attn.processor._attention_backend)
    return out.flatten(2, 3).to(values.dtype)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update; x and update [B, N, d], gate [B, d]."""
    out = torch.addcmul(x, gate[:, None], update)
    return out.clip(-FP16_LIMIT, FP16_LIMIT) if out.dtype == torch.float16 else out


class RecomputeBlock:
    """Put in front of a block of diffusers'.

    save_activations: keep what autograd usually keeps, since gradient checkpointing runs the block again anyway;
    recompute_projections: compute again also what its linear layers give.
    """

    save_activations = False
    recompute_projections = False

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
        image_rotary_emb: RotaryTable | None = None, joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Without gradients, or with arguments that only stock pipelines give: diffusers' own forward."""
        img, txt = hidden_states, encoder_hidden_states
        if image_rotary_emb is None or joint_attention_kwargs or not torch.is_grad_enabled():
            parent: Any = super()
            stock: tuple[Tensor, Tensor] = parent.forward(img, txt, temb, image_rotary_emb, joint_attention_kwargs)
            return stock
        return self.recomputing_forward(img, txt, temb, image_rotary_emb)

    def recomputing_forward(self, img: Tensor, txt: Tensor, vec: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
        """img [B, I, d], txt [B, T, d], vec [B, d] -> txt, img."""
        raise NotImplementedError


class RecomputeDoubleBlock(RecomputeBlock, FluxTransformerBlock):  # type: ignore[misc]
    """BFL's DoubleStreamBlock: image and text with weights of their own, joined in attention."""

    def recomputing_forward(self, img: Tensor, txt: Tensor, vec: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
        attn, save = self.attn, self.save_activations
        img_mod1, img_mod2 = modulation(self.norm1, vec)
        txt_mod1, txt_mod2 = modulation(self.norm1_context, vec)
        # Prepare image and text for attention: img_q, img_k, img_v [B, I, d], txt_q, txt_k, txt_v [B, T, d].
        img_modulated = recompute(Modulate(self.norm1.norm.eps), img, *img_mod1[:2], save=save)
        img_q, img_k, img_v = self._project(img_modulated, attn.to_q, attn.to_k, attn.to_v)
        txt_modulated = recompute(Modulate(self.norm1_context.norm.eps), txt, *txt_mod1[:2], save=save)
        txt_q, txt_k, txt_v = self._project(txt_modulated, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        # Attention over all N tokens, text first.
        pe, length = complex_pe(table), txt.shape[1]
        q = recompute(RotaryNorm(pe, attn.norm_added_q, attn.norm_q), txt_q, img_q, save=save)  # [B, N, heads, D]
        k = recompute(RotaryNorm(pe, attn.norm_added_k, attn.norm_k), txt_k, img_k, save=save)
        v = recompute(Concat(), txt_v, img_v, save=save)  # [B, N, d]
        attended = attention(attn, q, k, v)  # [B, N, d]
        txt_attn, img_attn = attended[:, :length], attended[:, length:]
        img = gated_residual(img, img_mod1.gate, attn.to_out[0](img_attn))
        txt = gated_residual(txt, txt_mod1.gate, attn.to_add_out(txt_attn))
        img = self._mlp(img, self.norm2, self.ff, img_mod2)
        return self._mlp(txt, self.norm2_context, self.ff_context, txt_mod2), img

    def _project(self, x: Lazy, *layers: nn.Module) -> list[Lazy]:
        return project(x, *layers, recompute=self.recompute_projections)

    def _mlp(self, x: Tensor, norm: nn.LayerNorm, ff: Any, mod: Mod) -> Tensor:
        """x + gate * MLP(modulated x) of one stream, [B, N_i, d]."""
        modulated = recompute(Modulate(norm.eps), x, mod.shift, mod.scale, save=self.save_activations)
        [hidden] = self._project(modulated, ff.net[0].proj)  # [B, N_i, 4 * d]
        activated = recompute(Gelu(), hidden, save=self.save_activations)
        with recompute_on_backward(activated):
            update = ff.net[2](activated[0])
        return gated_residual(x, mod.gate, update)


class RecomputeSingleBlock(RecomputeBlock, FluxSingleTransformerBlock):  # type: ignore[misc]
    """BFL's SingleStreamBlock: text and image as one sequence, attention and MLP side by side.

    last: it is the model's last block, behind which the text is dropped; queries and MLP of the image's tokens will do.
    """

    last = False

    def recomputing_forward(self, img: Tensor, txt: Tensor, vec: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
        attn, save, length = self.attn, self.save_activations, txt.shape[1]
        x, pe = torch.cat([txt, img], dim=1), complex_pe(table)  # [B, N, d]
        first = length if self.last else 0  # of the M = N - first tokens that have an output
        [mod] = modulation(self.norm, vec)
        modulated = recompute(Modulate(self.norm.norm.eps), x, mod.shift, mod.scale, save=save)  # [B, N, d]
        if first:
            tensor, source = modulated
            mlp, q = project((tensor[:, first:], source), self.proj_mlp, attn.to_q, recompute=False)
            k, v = project(modulated, attn.to_k, attn.to_v, recompute=False)
        else:
            mlp, q, k, v = project(
                modulated, self.proj_mlp, attn.to_q, attn.to_k, attn.to_v, recompute=self.recompute_projections
            )
        q = recompute(RotaryNorm(pe[first:], attn.norm_q), q, save=save)  # [B, M, heads, D]
        k = recompute(RotaryNorm(pe, attn.norm_k), k, save=save)  # [B, N, heads, D]
        attended = attention(attn, q, k, v)  # [B, M, d]
        joined = recompute(ConcatGelu(), attended, mlp, save=save)  # [B, M, 5 * d]
        with recompute_on_backward(joined):
            update = self.proj_out(joined[0])
        out = gated_residual(x[:, first:], mod.gate, update)  # [B, M, d]
        return (txt, out) if self.last else (out[:, :length], out[:, length:])


RECOMPUTING: dict[type, Any] = {
    FluxTransformerBlock: RecomputeDoubleBlock,
    FluxSingleTransformerBlock: RecomputeSingleBlock,
}


def enable_recompute(
    transformer: Any, *, checkpointed: Collection[nn.Module] = (), recompute_projections: bool = False
) -> None:
    """Let the transformer's blocks keep less for the backward pass; without gradients they run as diffusers' own.

    checkpointed: blocks that save their activations in the usual way, since gradient checkpointing drops them anyway.
    recompute_projections: keep still less, for more time. Not in the last block: when its turn comes in the backward
    pass, all that it kept would be there anyway.
    """
    block: Any
    saving = {id(block) for block in checkpointed}
    for block in blocks_of(transformer):
        if type(block) in RECOMPUTING:
            block.__class__ = RECOMPUTING[type(block)]
            block.save_activations, block.recompute_projections = id(block) in saving, recompute_projections
    *_, last = blocks_of(transformer)
    if isinstance(last, RecomputeBlock):
        last.recompute_projections = False
    if isinstance(last, RecomputeSingleBlock):
        last.last = True


def disable_recompute(transformer: Any) -> None:
    """Turn the blocks into diffusers' own again."""
    stock = {ours: theirs for theirs, ours in RECOMPUTING.items()}
    for block in blocks_of(transformer):
        if type(block) in stock:
            block.__class__ = stock[type(block)]
            for name in ("save_activations", "recompute_projections", "last"):
                block.__dict__.pop(name, None)
