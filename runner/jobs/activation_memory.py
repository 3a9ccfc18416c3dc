"""Bytes that a forward pass leaves for the backward pass, by what autograd saves in the libraries' blocks and in
`runner.model.flux1.recompute`'s. No torch.

What is saved, and what is not (torch 2.13, diffusers 0.42, peft 0.21, transformers 5.23; tests count it):
a frozen linear layer needs its weight alone; a LoRA needs its input and its middle; layer and RMS norms, GELU and
attention need their inputs (attention its output and a sum per row, too). A product with the modulation needs the other
factor only where the modulation itself learns: through token rows in CLIP, or a LoRA on its linear layer. Nothing is saved
before the first thing that learns.

Under autocast to 16 bits on a GPU, norms see fp32 copies of their inputs, every LoRA its own 16-bit copy of its input. A
lean block has no such copies, and makes again what norms, GELU and the turning of queries and keys make; so does T5's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

# Buffers of the backward pass beside what was saved, in numbers per token and width: the gradients of a single block's MLP
# and of what goes into its last layer. Measured.
BACKWARD = 12
FORWARD = 12  # the same of a forward pass that saves nothing: residual, norm, MLP twice, attention, their concatenation
ENCODER_MAPS = 4.5  # maps of the first level's width at full resolution that the VAE's encoder holds at once; measured
DECODER_MAPS = 4.0  # the same of its decoder, of the second level's width: what comes out of the last upsampling


@dataclass(frozen=True)
class ByteWidths:
    """Bytes of a number: in matrix products, and as norms see it."""

    narrow: int
    wide: int


@dataclass(frozen=True)
class BatchShape:
    """What goes through the transformer at once: images, tokens of one image, tokens of its text."""

    images: int
    img: int
    txt: int

    @property
    def both(self) -> int:
        return self.images * (self.img + self.txt)


@dataclass(frozen=True)
class TrainableLayers:
    """What a training phase's backward pass must reach. layers: those with a LoRA that learns, shaped (out, in); rows:
    whether the pooled vector, or T5's states, come from an encoder that learns."""

    layers: Mapping[str, tuple[int, int]]
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
    what: TrainableLayers,
    again: Collection[int],
    *,
    lean: bool,
    selective: bool = False,
) -> int:
    """At the end of a forward pass, or when a block whose place is among `again` is run once more in the backward pass,
    whichever is more. lean: whether the others are `runner.model.flux1.recompute`'s; selective: whether these make their projections again,
    but for the last one."""
    d, heads = config["attention_head_dim"] * config["num_attention_heads"], config["num_attention_heads"]
    around = {name.split(".")[0] for name in what.layers if "blocks." not in name}
    pooled = what.pooled or "time_text_embed" in around
    img_in, txt_in = "x_embedder" in around, what.states or "context_embedder" in around
    adapted: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in what.layers.items():
        stack, place, suffix = (*name.split(".", 2), "", "")[:3]
        adapted.setdefault(f"{stack}.{place}", {})[suffix] = shape
    kept: list[tuple[int, int]] = []  # of each block: by its forward pass, and by the one that is for the backward pass
    place_of_block = -1
    known: dict[tuple[Any, ...], int] = {}
    for kind, count in (("transformer_blocks", "num_layers"), ("single_transformer_blocks", "num_single_layers")):
        for index in range(config[count]):
            place_of_block += 1
            own = adapted.get(f"{kind}.{index}", {})
            if not (own or pooled or img_in or txt_in):
                continue
            twice = place_of_block in again
            ends_here = kind == "single_transformer_blocks" and index + 1 == config[count]
            if (alike := (kind, twice, ends_here, img_in, txt_in, *own)) not in known:
                if lean and not twice:
                    less = selective and not ends_here
                    saved = _lean(kind, own, d, heads, batch, width, what, pooled, img_in, txt_in, ends_here, less)
                else:
                    block = _double if kind == "transformer_blocks" else _single
                    saved = block(own, d, heads, batch, width, what, pooled, img_in, txt_in)
                known[alike] = saved + _loras(own, what, width)
            img_in = txt_in = True  # attention mixes them
            kept.append((batch.both * d * width.narrow if twice else known[alike], known[alike]))
    rotary = 2 * (batch.img + batch.txt) * config["attention_head_dim"] * 4
    ends = batch.both * d * width.narrow if width.wide == width.narrow else batch.images * batch.img * d * width.wide
    ends += batch.images * batch.img * d * width.wide * pooled
    ends += batch.images * batch.img * config["in_channels"] * 4 * 4  # noised, target, prediction, their difference
    worst = there = sum(first for first, _ in kept)
    for first, second in reversed(kept):
        worst = max(worst, there - first + second)
        there -= first
    return int(worst + rotary + ends)


def backward_buffers(config: Config, batch: BatchShape, width: ByteWidths) -> int:
    return BACKWARD * batch.both * _width(config) * width.wide


def forward_buffers(config: Config, batch: BatchShape, width: ByteWidths) -> int:
    return FORWARD * batch.both * _width(config) * width.narrow


def _width(config: Config) -> int:
    return int(config["attention_head_dim"] * config["num_attention_heads"])


def _double(
    own: Collection[str], d: int, heads: int, batch: BatchShape, width: ByteWidths, what: TrainableLayers, pooled: bool,
    img_in: bool, txt_in: bool,
) -> int:  # fmt: skip
    """img_in, txt_in: whether what comes in already leads back to something that learns."""
    total = _attention(d, heads, batch, width)
    for tokens, names, led in ((batch.img, DOUBLE_IMG, img_in), (batch.txt, DOUBLE_TXT, txt_in)):
        q, k, v, out, first, second, norm = names
        modulated = pooled or norm in own
        count = batch.images * tokens
        total += count * d * width.wide * (led + 1)  # into both norms
        total += count * (d * width.wide + heads * 4) * sum(led or modulated or name in own for name in (q, k))
        total += count * 4 * d * width.narrow  # into the GELU
        total += _inputs([name for name in (q, k, v) if name in own], count * d, width)
        total += count * d * width.narrow * (out in own) * (batch.images > 1 or width.narrow < 4)  # contiguous anew
        total += count * d * width.narrow * (first in own)
        total += count * 4 * d * width.narrow * (second in own)
        total += count * d * 2 * (width.wide + width.narrow) * modulated
        total += _middles([name for name in names[:6] if name in own], count, d, what, width)
    return total


def _single(
    own: Collection[str], d: int, heads: int, batch: BatchShape, width: ByteWidths, what: TrainableLayers, pooled: bool,
    img_in: bool, txt_in: bool,
) -> int:  # fmt: skip
    led = img_in or txt_in
    modulated = pooled or "norm.linear" in own
    inner = led or modulated
    asked = any(inner or name in own for name in ("attn.to_q", "attn.to_k", "attn.to_v"))
    total = _attention(d, heads, batch, width) * asked
    total += batch.both * d * width.wide * led  # into the norm
    total += (
        batch.both * (d * width.wide + heads * 4) * sum(inner or name in own for name in ("attn.to_q", "attn.to_k"))
    )
    total += batch.both * 4 * d * width.narrow * (inner or "proj_mlp" in own)  # into the GELU
    reading = [name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp") if name in own]
    total += _inputs(reading, batch.both * d, width)
    total += batch.both * 5 * d * width.narrow * ("proj_out" in own)
    total += batch.both * d * (width.wide + width.narrow) * modulated
    return total + _middles([*reading, *(["proj_out"] if "proj_out" in own else [])], batch.both, d, what, width)


def _lean(
    kind: str, own: Collection[str], d: int, heads: int, batch: BatchShape, width: ByteWidths, what: TrainableLayers, pooled: bool,
    img_in: bool, txt_in: bool, ends_here: bool, less: bool,
) -> int:  # fmt: skip
    """ends_here: of the text the last block keeps only what the image attends to; less: neither queries, keys, values nor
    what the GELU reads, but always what they are made of."""
    each = d * width.narrow
    if kind == "transformer_blocks":
        total = _attention(d, heads, batch, width) - 3 * batch.both * each * less
        for tokens, names, led in ((batch.img, DOUBLE_IMG, img_in), (batch.txt, DOUBLE_TXT, txt_in)):
            count, modulated = batch.images * tokens, pooled or names[6] in own
            reads = less or led or modulated or any(name in own for name in names[:3])
            total += (
                count * each * (reads + 1 + 4 * (not less) + 2 * modulated)
            )  # both norms' inputs, the GELU's, two gated
            total += count * each * (names[3] in own) * (batch.images > 1)  # contiguous anew
            total += _middles([name for name in names[:6] if name in own], count, d, what, width)
        return total
    led, modulated = img_in or txt_in, pooled or "norm.linear" in own
    count = batch.images * batch.img if ends_here else batch.both
    pair = [name for name in ("attn.to_k", "attn.to_v") if name in own]
    rest = [name for name in ("attn.to_q", "proj_mlp") if name in own]
    inner = led or modulated
    total = 0
    if inner or "attn.to_q" in rest or pair:  # keys and values of all, queries and what comes out of some
        total += count * (each + heads * 4) + (batch.both * 2 * each + count * each) * (not less)
    total += batch.both * each * (inner or bool(pair or rest))  # into the norm
    total += count * 4 * each * (not less) * (inner or "proj_mlp" in own or "proj_out" in own)  # into the GELU
    total += count * each * modulated
    total += count * each * bool(rest) * (ends_here and batch.images > 1)  # contiguous anew
    total += _middles(pair, batch.both, d, what, width)
    return total + _middles([*rest, *(["proj_out"] if "proj_out" in own else [])], count, d, what, width)


def _attention(d: int, heads: int, batch: BatchShape, width: ByteWidths) -> int:
    return batch.both * (4 * d * width.narrow + heads * 4)


def _inputs(names: Collection[str], numbers: int, width: ByteWidths) -> int:
    """Of LoRAs that read the same: in fp32 the tensor itself, in 16 bits a copy for each."""
    return numbers * width.narrow * (len(names) if width.narrow < 4 else bool(names))


def _middles(names: Collection[str], tokens: int, d: int, what: TrainableLayers, width: ByteWidths) -> int:
    dropped = tokens * d * (1 + width.narrow) * what.dropout  # its mask, and what it leaves
    return len(names) * (tokens * what.rank * width.narrow + dropped)


def _loras(own: Mapping[str, tuple[int, int]], what: TrainableLayers, width: ByteWidths) -> int:
    """16-bit copies that autocast makes of the adapters."""
    numbers = sum(what.rank * (out + inside) for out, inside in own.values())
    return numbers * width.narrow if width.narrow < 4 else 0


# ---- encoders --------------------------------------------------------------------------------------------------------


def t5_saved(config: Config, captions: int, tokens: int, narrow: int, *, selective: bool = False) -> int:
    """Where rows are learned, in `runner.model.flux1.recompute_t5`'s blocks; the encoder runs in its own dtype, without autocast."""
    count, d, inner = captions * tokens, config["d_model"], config["num_heads"] * config["d_kv"]
    attention = count * (inner * narrow * (1 if selective else 4) + config["num_heads"] * 4)
    sides = 0 if selective else 2 * config["d_ff"]  # of the GELU
    layer = attention + count * (2 * d + sides) * narrow  # into both norms
    bias = config["num_heads"] * tokens * tokens * narrow
    norm = count * d * (4 if narrow == 4 else 4 + narrow)  # the last one is transformers', in fp32
    return int(config["num_layers"] * layer + bias + norm)


def t5_buffers(config: Config, captions: int, tokens: int, narrow: int) -> int:
    """Of a forward pass that saves nothing."""
    bias = 2 * config["num_heads"] * tokens * tokens * narrow
    return int(captions * tokens * (5 * config["d_ff"] + 3 * config["d_model"]) * narrow + bias)


def clip_saved(config: Config, captions: int, narrow: int, lora_rank: int) -> int:
    """`lora_rank`: of the LoRA on its attention, 0 where rows are learned instead."""
    count, w = captions * config["max_position_embeddings"], config["hidden_size"]
    layer = count * (6 * w + 2 * config["intermediate_size"]) * narrow
    adapters = count * (w + 4 * lora_rank) * 4 if lora_rank else 0
    return int(config["num_hidden_layers"] * (layer + adapters) + count * w * narrow)


def clip_buffers(config: Config, captions: int, narrow: int) -> int:
    count = captions * config["max_position_embeddings"]
    return int(count * (3 * config["intermediate_size"] + 4 * config["hidden_size"]) * narrow)


def vae_encoder_buffers(config: Config, pixels: int, narrow: int) -> int:
    return int(ENCODER_MAPS * config["block_out_channels"][0] * pixels * narrow)


def vae_decoder_buffers(config: Config, pixels: int, narrow: int) -> int:
    channels = config["block_out_channels"]
    return int(DECODER_MAPS * channels[min(1, len(channels) - 1)] * pixels * narrow)
