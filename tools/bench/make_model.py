"""A model with FLUX.1's proportions and random weights, in diffusers' layout: fine for timing, good for nothing else.

    python tools/bench/make_model.py OUT

FLUX.1-dev divided by about six in width and in depth: 3 double and 6 single blocks (1:2), T5 a third wider than the
transformer's heads would need and 0.4 of its parameters, a small CLIP, an f = 8 VAE. The tokenizers are the bundled
base's, so any caption can be read.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

TINY = Path(__file__).resolve().parents[2] / "runner" / "bases" / "tiny"


def make_transformer() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=512,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )


def make_t5(vocabulary: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=512, d_kv=64, d_ff=1280, num_layers=6, num_heads=10,
            feed_forward_proj="gated-gelu", dropout_rate=0.1, is_encoder_decoder=False, use_cache=False,
            pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def make_clip(vocabulary: int, bos: int, eos: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=77, projection_dim=128, bos_token_id=bos, eos_token_id=eos, pad_token_id=eos,
        )
    )  # fmt: skip


def make_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=256,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def make(out: Path) -> dict[str, int]:
    """Write the model; the number of parameters of each part."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizers = [AutoTokenizer.from_pretrained(TINY, subfolder=part) for part in ("tokenizer", "tokenizer_2")]
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(TINY, subfolder="scheduler"),
        vae=make_vae(),
        text_encoder=make_clip(len(tokenizers[0]), tokenizers[0].bos_token_id, tokenizers[0].eos_token_id),
        tokenizer=tokenizers[0],
        text_encoder_2=make_t5(len(tokenizers[1])),
        tokenizer_2=tokenizers[1],
        transformer=make_transformer(),
    )
    shutil.rmtree(out, ignore_errors=True)
    pipe.save_pretrained(out)
    parts = ("transformer", "text_encoder_2", "text_encoder", "vae")
    return {part: numbers(getattr(pipe, part)) for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for part, count in make(parser.parse_args().out).items():
        print(f"{part}: {count / 1e6:.2f} M")


if __name__ == "__main__":
    main()
