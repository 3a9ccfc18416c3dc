"""The bundled base's parts, untrained: FLUX.1-dev's classes and layout in miniature; and the optimizer they are trained
with."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CLIP_LENGTH = 77
CLIP_VOCABULARY = 1000


def make_vae() -> Any:
    """f = 8 and 16 latent channels, as FLUX.1's. One group a norm: one channel a group learned badly."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_clip(vocabulary: int, bos: int, eos: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            projection_dim=64,
            bos_token_id=bos,
            eos_token_id=eos,  # the real id: the legacy value 2 would pool at the highest id, a new token's
            pad_token_id=eos,
        )
    )


def make_t5(vocabulary: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=96,
            d_kv=16,
            d_ff=256,
            num_layers=2,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def make_transformer() -> Any:
    """2 double and 4 single blocks, 4 heads of 32; adaLN and the last layer start at zero, as DiT's do."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        modulates = name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"))
        if isinstance(module, nn.Linear) and (modulates or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def make_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def make_clip_tokenizer(captions: Iterable[str], folder: Path) -> Any:
    """Byte-level BPE with end-of-word marks, CLIP's kind; every byte is a piece, so no text is unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = set(model["vocab"]) | {letter + "</w>" for letter in alphabet}
    ordered = sorted(pieces, key=lambda piece: (model["vocab"].get(piece, 10**6), piece))
    vocab = {piece: index for index, piece in enumerate([*ordered, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    built = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)
    built.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def make_t5_tokenizer(captions: Iterable[str], folder: Path) -> Any:
    """Unigram pieces with T5's special ids (pad 0, eos 1, unk 2): the captions' words whole, all else by character.

    Scores are log frequencies, set directly: the library's unigram trainer throws whole words out of so small a text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    words = Counter(word for caption in captions for word in caption.replace(",", " ,").split())
    total = sum(words.values())
    scored = [(("" if word == "," else "▁") + word, math.log(count / total)) for word, count in words.most_common()]
    have = {piece for piece, _ in scored}
    single = ["▁", *(chr(code) for code in range(33, 127))]
    rare = math.log(0.1 / total)
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *scored,
        *((piece, rare) for piece in single if piece not in have),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    built = T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512)
    built.save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


# ---- optimizer -----------------------------------------------------------------------------------------------------


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The nearest orthogonal matrix, nearly: Newton-Schulz with Jordan's coefficients (Muon, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for hidden matrices and convolutions (a kernel is a matrix [out, in * k * k])."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                moving = state["momentum"]
                moving.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(moving, group["momentum"]).flatten(1)
                scale = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                parameter.add_(orthogonal(ahead).view_as(parameter), alpha=-group["lr"] * scale)


def split_for_muon(module: nn.Module, but: tuple[str, ...] = ()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(hidden matrices, the rest). Embeddings and the layers named in `but` (ends of names) belong to the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        hidden = (
            parameter.ndim >= 2 and "embed" not in name and "shared" not in name and not name.endswith(but or ("\0",))
        )
        (matrices if hidden else rest).append(parameter)
    return matrices, rest


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            self.values[name].lerp_(value, 1 - decay)
