"""The floor of a step: the transformer's forward and backward, the clip, the optimizer's step, and nothing else.

    python tools/bench/bare.py MODEL [--steps 10] [--encoders clip t5] [--optimizer adamw] [--compile] [--resolution 256] ...

It imports nothing of fluxrun: diffusers' and transformers' own classes, peft's adapter on the layers of the preset
"attention+mlp" (which are the reference script's too), torch's or prodigyopt's optimizer, and tensors drawn once. With
encoders named, each runs forward and backward too, for two learned rows behind its frozen table; the others' outputs
stand there as noise. By itself it prints the seconds of a step; `step.py` takes turns with it, `lora_memory.py` watches
it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = (
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0",
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
PARTS = {"clip": "text_encoder", "t5": "text_encoder_2"}
ROWS = 2


@dataclass(frozen=True)
class Shape:
    """resolution: pixels a side; tokens: those T5 reads; encoders: which learn rows."""

    resolution: int = 256
    tokens: int = 128
    batch: int = 1
    rank: int = 8
    optimizer: str = "adamw"
    encoders: tuple[str, ...] = ()


class Table(nn.Module):
    """A frozen embedding table with rows that learn behind it."""

    def __init__(self, table: nn.Embedding, rows: nn.Parameter) -> None:
        super().__init__()
        self.table, self.rows = table, rows

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        known, count = self.table(ids.clamp(max=self.table.num_embeddings - 1)), self.table.num_embeddings
        return torch.where((ids >= count)[..., None], self.rows[(ids - count).clamp(min=0)], known)


class Bare:
    """A loop with its model; `turn(n)` does n steps."""

    def __init__(self, model: Path, shape: Shape) -> None:
        from diffusers import FluxTransformer2DModel
        from peft import LoraConfig

        torch.manual_seed(0)
        self.shape = shape
        self.transformer: Any = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")
        self.transformer.requires_grad_(False)
        self.transformer.add_adapter(LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=list(LAYERS)))
        self.transformer.train()
        self.encoders = {name: Encoder(name, model, shape) for name in shape.encoders}
        lora = [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]
        rows = [encoder.table.rows for encoder in self.encoders.values()]
        self.parameters = [*lora, *rows]
        self.optimizer = optimizer_of(shape.optimizer, [group for group in (lora, rows) if group])
        self.inputs, self.target = inputs_of(model, self.transformer.config, shape)

    @property
    def trained(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def turn(self, steps: int) -> None:
        for _ in range(steps):
            read = {encoder.key: encoder() for encoder in self.encoders.values()}
            out = self.transformer(**{**self.inputs, **read}, return_dict=False)[0]
            (out - self.target).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class Encoder:
    """CLIP or T5 with its rows and one batch of ids, two of which are the rows'."""

    def __init__(self, name: str, model: Path, shape: Shape) -> None:
        from transformers import CLIPTextModel, T5EncoderModel

        kind, length = {"clip": (CLIPTextModel, 77), "t5": (T5EncoderModel, shape.tokens)}[name]
        self.name, self.key = name, {"clip": "pooled_projections", "t5": "encoder_hidden_states"}[name]
        self.model: Any = kind.from_pretrained(model, subfolder=PARTS[name]).requires_grad_(False).eval()
        table = self.model.get_input_embeddings()
        count, width = table.weight.shape
        self.table = Table(table, nn.Parameter(torch.randn(ROWS, width) * float(table.weight.std())))
        self.model.set_input_embeddings(self.table)
        self.ids = torch.randint(3, count - 8, (shape.batch, length))
        self.ids[:, 4 : 4 + ROWS] = torch.arange(count, count + ROWS)
        self.ids[:, 12:] = self.model.config.eos_token_id

    def __call__(self) -> Tensor:
        out = self.model(self.ids)
        read: Tensor = out.pooler_output if self.name == "clip" else out[0]
        return read


def inputs_of(model: Path, config: Any, shape: Shape) -> tuple[dict[str, Tensor | None], Tensor]:
    """What the transformer is given, drawn once, and what it shall give."""
    vae = json.loads((model / "vae" / "config.json").read_text())
    side = shape.resolution // 2 ** (len(vae["block_out_channels"]) - 1) // 2
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None, :]
    img, target = (torch.randn(shape.batch, side * side, config.in_channels) for _ in range(2))
    return {
        "hidden_states": img,
        "timestep": torch.full((shape.batch,), 0.5),
        "guidance": torch.full((shape.batch,), 3.5) if config.guidance_embeds else None,
        "pooled_projections": torch.randn(shape.batch, config.pooled_projection_dim),
        "encoder_hidden_states": torch.randn(shape.batch, shape.tokens, config.joint_attention_dim),
        "txt_ids": torch.zeros(shape.tokens, 3),
        "img_ids": ids.reshape(-1, 3),
    }, target


def optimizer_of(name: str, groups: list[list[nn.Parameter]]) -> torch.optim.Optimizer:
    rows = [{"params": group} for group in groups]
    if name == "adamw":
        return torch.optim.AdamW(rows, lr=1e-4, weight_decay=1e-4, foreach=True)
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it announces its weight decay
        made: torch.optim.Optimizer = Prodigy(
            rows, lr=1.0, weight_decay=1e-4, decouple=True, use_bias_correction=True, safeguard_warmup=True
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--encoders", nargs="*", choices=tuple(PARTS), default=())
    parser.add_argument("--optimizer", choices=("adamw", "prodigy"), default=Shape.optimizer)
    parser.add_argument("--compile", action="store_true", help="its blocks, as model.compile does")
    for name in ("resolution", "tokens", "batch", "rank"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shape, name))
    own = parser.parse_args()
    began = time.perf_counter()
    loop = Bare(own.model, Shape(own.resolution, own.tokens, own.batch, own.rank, own.optimizer, tuple(own.encoders)))
    if own.compile:
        loop.transformer.compile_repeated_blocks()
    loop.turn(1)
    print(f"{time.perf_counter() - began:.1f} s to the end of the first step")
    seconds = []
    for _ in range(own.steps):
        began = time.perf_counter()
        loop.turn(1)
        seconds.append(time.perf_counter() - began)
    print(f"{statistics.median(seconds):.4f} s/step, {loop.trained} numbers trained")


if __name__ == "__main__":
    main()
