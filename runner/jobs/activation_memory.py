"""Bytes that a forward pass of the transformer saves for the backward pass, counted from what autograd saves.

Both kinds of blocks are covered: diffusers', and those of `runner.model.flux1.recompute`. Saved (with torch 2.13,
diffusers 0.42, peft 0.21, transformers 5.23; tests count it):

- a frozen linear layer saves nothing but its weight; a LoRA saves its input and its low-rank product;
- layer and RMS norms, GELU and attention save their inputs; attention also its output and one sum per row;
- a product with the modulation saves the other factor only where the modulation is trained: through token rows in CLIP, or a
  LoRA on its linear layer;
- nothing is saved before the first layer that is trained.

Under autocast to 16 bits on a GPU, norms save fp32 copies of their inputs and every LoRA its own 16-bit copy of its
input. A recomputing block has no such copies, and recomputes what norms, GELU and the rotation of queries and keys
give.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
LayerShapes = Mapping[str, tuple[int, int]]  # name -> (out, in) features

# Buffers of the backward pass besides what was saved, in numbers per token and width: the gradients of a single block's
# MLP and of the input of its last layer. Measured.
BACKWARD = 12
# The same of a forward pass that saves nothing: residual, norm, MLP twice, attention, their concatenation.
FORWARD = 12


@dataclass(frozen=True)
class ByteWidths:
    """Bytes of a number. narrow: in matrix products. wide: in norms."""

    narrow: int
    wide: int


@dataclass(frozen=True)
class BatchShape:
    """What goes through the transformer at once. img, txt: tokens of one image, and of its text."""

    images: int
    img: int
    txt: int

    @property
    def both(self) -> int:
        """Image and text tokens of the whole batch."""
        return self.images * (self.img + self.txt)


@dataclass(frozen=True)
class TrainableLayers:
    """What the backward pass must reach. layers: those of the transformer with a LoRA that is trained. pooled, states:
    whether the pooled vector, or T5's states, come from an encoder that is trained."""

    layers: LayerShapes
    rank: int
    dropout: bool
    pooled: bool
    states: bool


DOUBLE_IMG = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")
DOUBLE_TXT = (
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "ff_context.net.0.proj",
    "ff_context.net.2", "norm1_context.linear",
)  # fmt: skip


def transformer_saved(
    config: Config,
    batch: BatchShape,
    width: ByteWidths,
    trained: TrainableLayers,
    checkpointed: Collection[int],
    *,
    recompute: bool,
    selective: bool = False,
) -> int:
    """The most bytes that are saved at a time: at the end of the forward pass, or while a checkpointed block is run
    again.

    checkpointed: indices of the blocks that gradient checkpointing runs again in the backward pass. recompute: whether
    the others are `runner.model.flux1.recompute`'s. selective: whether these also recompute their projections; the last
    block does not.
    """
    blocks = _Blocks(config, batch, width, trained)
    outside = {name.split(".")[0] for name in trained.layers if "blocks." not in name}
    modulation = trained.pooled or "time_text_embed" in outside
    source = _Source("x_embedder" in outside, trained.states or "context_embedder" in outside, modulation)
    saved: list[tuple[int, int]] = []  # by each block: in the forward pass, and while it is run again
    known: dict[tuple[Any, ...], int] = {}  # blocks of one kind with the same LoRAs save the same
    adapted_layers = _by_block(trained.layers)
    kinds = ["transformer_blocks"] * config["num_layers"] + ["single_transformer_blocks"] * config["num_single_layers"]
    for index, kind in enumerate(kinds):
        number = index if kind == "transformer_blocks" else index - config["num_layers"]
        adapted = adapted_layers.get(f"{kind}.{number}", {})
        if not (adapted or source.any):
            continue
        again = index in checkpointed
        is_last = kind == "single_transformer_blocks" and index + 1 == len(kinds)
        if (alike := (kind, again, is_last, source, *adapted)) not in known:
            if recompute and not again:
                block_bytes = blocks.recomputing(kind, adapted, source, is_last, selective and not is_last)
            elif kind == "transformer_blocks":
                block_bytes = blocks.double(adapted, source)
            else:
                block_bytes = blocks.single(adapted, source)
            known[alike] = block_bytes + blocks.adapter_copies(adapted)
        source = _Source(True, True, modulation)  # attention mixes them
        saved.append((blocks.tensor() if again else known[alike], known[alike]))
    most = present = sum(in_forward for in_forward, _ in saved)
    for in_forward, run_again in reversed(saved):
        most = max(most, present - in_forward + run_again)
        present -= in_forward
    return int(most + blocks.outside(modulation))


def _by_block(layers: LayerShapes) -> dict[str, dict[str, tuple[int, int]]]:
    """ "transformer_blocks.3" -> {"attn.to_q": (out, in)}; layers outside blocks are under other names."""
    by_block: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in layers.items():
        stack, number, suffix = (*name.split(".", 2), "", "")[:3]
        by_block.setdefault(f"{stack}.{number}", {})[suffix] = shape
    return by_block


def backward_buffers(config: Config, batch: BatchShape, width: ByteWidths) -> int:
    """Bytes of the largest gradients at a time."""
    return BACKWARD * batch.both * _width(config) * width.wide


def forward_buffers(config: Config, batch: BatchShape, width: ByteWidths) -> int:
    """Bytes in use at the peak of a forward pass without gradients."""
    return FORWARD * batch.both * _width(config) * width.narrow


def _width(config: Config) -> int:
    return int(config["attention_head_dim"] * config["num_attention_heads"])


@dataclass(frozen=True)
class _Source:
    """Which inputs of a block depend on something that is trained: image tokens, text tokens, modulation vector."""

    img: bool
    txt: bool
    modulation: bool

    @property
    def any(self) -> bool:
        return self.img or self.txt or self.modulation


@dataclass(frozen=True)
class _Blocks:
    """Bytes that one block saves, by its kind. `adapted` names the block's layers with a LoRA."""

    config: Config
    batch: BatchShape
    width: ByteWidths
    trained: TrainableLayers

    @property
    def d(self) -> int:
        return _width(self.config)

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    def tensor(self) -> int:
        """All tokens' residual stream, once."""
        return self.batch.both * self.d * self.width.narrow

    def outside(self, modulation: bool) -> int:
        """What is saved before and after the blocks."""
        batch, width, img_tokens = self.batch, self.width, self.batch.images * self.batch.img
        rotary = 2 * (batch.img + batch.txt) * self.config["attention_head_dim"] * 4
        final = self.tensor() if width.wide == width.narrow else img_tokens * self.d * width.wide
        final += img_tokens * self.d * width.wide * modulation
        loss = img_tokens * self.config["in_channels"] * 4 * 4  # noised, target, prediction, their difference
        return int(rotary + final + loss)

    def double(self, adapted: Collection[str], source: _Source) -> int:
        """A FluxTransformerBlock of diffusers."""
        d, heads, batch, width = self.d, self.heads, self.batch, self.width
        total = self._attention()
        for tokens, names, has_grad in ((batch.img, DOUBLE_IMG, source.img), (batch.txt, DOUBLE_TXT, source.txt)):
            q, k, v, out, mlp_in, mlp_out, norm = names
            modulated = source.modulation or norm in adapted
            count = batch.images * tokens
            total += count * d * width.wide * (has_grad + 1)  # inputs of both layer norms
            total += (
                count * (d * width.wide + heads * 4) * sum(has_grad or modulated or name in adapted for name in (q, k))
            )
            total += count * 4 * d * width.narrow  # input of the GELU
            total += self._lora_inputs([name for name in (q, k, v) if name in adapted], count * d)
            total += (
                count * d * width.narrow * (out in adapted) * (batch.images > 1 or width.narrow < 4)
            )  # made contiguous
            total += count * d * width.narrow * (mlp_in in adapted)
            total += count * 4 * d * width.narrow * (mlp_out in adapted)
            total += count * d * 2 * (width.wide + width.narrow) * modulated
            total += self._lora_products([name for name in names[:6] if name in adapted], count)
        return total

    def single(self, adapted: Collection[str], source: _Source) -> int:
        """A FluxSingleTransformerBlock of diffusers."""
        d, heads, batch, width = self.d, self.heads, self.batch, self.width
        has_grad = source.img or source.txt
        modulated = source.modulation or "norm.linear" in adapted
        inside = has_grad or modulated
        attends = any(inside or name in adapted for name in ("attn.to_q", "attn.to_k", "attn.to_v"))
        normed = sum(inside or name in adapted for name in ("attn.to_q", "attn.to_k"))
        total = self._attention() * attends
        total += batch.both * d * width.wide * has_grad  # input of the layer norm
        total += batch.both * (d * width.wide + heads * 4) * normed
        total += batch.both * 4 * d * width.narrow * (inside or "proj_mlp" in adapted)  # input of the GELU
        readers = [name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp") if name in adapted]
        total += self._lora_inputs(readers, batch.both * d)
        total += batch.both * 5 * d * width.narrow * ("proj_out" in adapted)
        total += batch.both * d * (width.wide + width.narrow) * modulated
        return total + self._lora_products([*readers, *_if_in("proj_out", adapted)], batch.both)

    def recomputing(
        self, kind: str, adapted: Collection[str], source: _Source, is_last: bool, projections: bool
    ) -> int:
        """A block of `runner.model.flux1.recompute`. is_last: of the text it keeps only what image tokens attend to.
        projections: queries, keys, values and the GELU's input are recomputed too, from an input that is always
        saved."""
        if kind == "transformer_blocks":
            return self._recomputing_double(adapted, source, projections)
        return self._recomputing_single(adapted, source, is_last, projections)

    def _recomputing_double(self, adapted: Collection[str], source: _Source, projections: bool) -> int:
        batch, each = self.batch, self.d * self.width.narrow
        total = self._attention() - 3 * batch.both * each * projections
        for tokens, names, has_grad in ((batch.img, DOUBLE_IMG, source.img), (batch.txt, DOUBLE_TXT, source.txt)):
            count, modulated = batch.images * tokens, source.modulation or names[6] in adapted
            saves_input = projections or has_grad or modulated or any(name in adapted for name in names[:3])
            # inputs of both norms, of the GELU, and of two gates
            total += count * each * (saves_input + 1 + 4 * (not projections) + 2 * modulated)
            total += count * each * (names[3] in adapted) * (batch.images > 1)  # made contiguous
            total += self._lora_products([name for name in names[:6] if name in adapted], count)
        return total

    def _recomputing_single(self, adapted: Collection[str], source: _Source, is_last: bool, projections: bool) -> int:
        batch, each, saves = self.batch, self.d * self.width.narrow, not projections
        modulated = source.modulation or "norm.linear" in adapted
        inside = source.img or source.txt or modulated
        count = batch.images * batch.img if is_last else batch.both  # tokens whose output is used
        keys_values = [name for name in ("attn.to_k", "attn.to_v") if name in adapted]
        others = [name for name in ("attn.to_q", "proj_mlp") if name in adapted]
        total = 0
        if inside or "attn.to_q" in others or keys_values:  # keys and values of all tokens; queries, output
            total += count * (each + self.heads * 4) + (batch.both * 2 * each + count * each) * saves
        total += batch.both * each * (inside or bool(keys_values or others))  # input of the norm
        total += count * 4 * each * saves * (inside or "proj_mlp" in adapted or "proj_out" in adapted)  # of the GELU
        total += count * each * modulated
        total += count * each * bool(others) * (is_last and batch.images > 1)  # made contiguous
        total += self._lora_products(keys_values, batch.both)
        return total + self._lora_products([*others, *_if_in("proj_out", adapted)], count)

    def adapter_copies(self, adapted: LayerShapes) -> int:
        """16-bit copies that autocast makes of the adapters."""
        numbers = sum(self.trained.rank * (out + inside) for out, inside in adapted.values())
        return numbers * self.width.narrow if self.width.narrow < 4 else 0

    def _attention(self) -> int:
        return self.batch.both * (4 * self.d * self.width.narrow + self.heads * 4)

    def _lora_inputs(self, names: Collection[str], numbers: int) -> int:
        """Of LoRAs that read the same tensor: the tensor itself in fp32, a copy for each in 16 bits."""
        return numbers * self.width.narrow * (len(names) if self.width.narrow < 4 else bool(names))

    def _lora_products(self, names: Collection[str], tokens: int) -> int:
        """Low-rank products, and with dropout its mask and its result."""
        dropped = tokens * self.d * (1 + self.width.narrow) * self.trained.dropout
        return len(names) * (tokens * self.trained.rank * self.width.narrow + dropped)


def _if_in(name: str, names: Collection[str]) -> list[str]:
    return [name] if name in names else []
