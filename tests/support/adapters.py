"""LoRA adapters of every kind, written in both layouts and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.base.files import BUILTIN
from runner.base.layers import clip_layers, linear_layers, lora_layers
from runner.checkpoint.storage import Weights
from runner.export import formats
from runner.export.about import AdapterShapes, ExportInfo
from runner.model.flux1 import layer_names
from runner.model.lora import LoraShape

TINY = BUILTIN["builtin:tiny"]
CONFIG = json.loads((TINY / "transformer" / "config.json").read_text())
CLIP = json.loads((TINY / "text_encoder" / "config.json").read_text())
LINEAR = linear_layers(CONFIG)
SINGLES = tuple(name for name in lora_layers(LINEAR, "all") if name.startswith("single_"))
# name -> (layers, rank, alpha, whether CLIP has LoRA too)
CASES: dict[str, tuple[str | tuple[str, ...], int, float, bool]] = {
    "attention": ("attention", 4, 4.0, False),
    "attention, clip": ("attention", 4, 4.0, True),
    "attention+mlp, alpha": ("attention+mlp", 4, 2.0, True),
    "all, odd alpha": ("all", 3, 1.7, True),
    "singles": (SINGLES, 4, 8.0, False),
    "one q": (("transformer_blocks.0.attn.to_q",), 3, 6.0, False),
    "one mlp": (("single_transformer_blocks.2.proj_mlp",), 4, 4.0, False),
    "q and v": (("attn.to_q", "attn.to_v"), 3, 3.0, False),
    "clip alone": ((), 4, 2.0, True),
}


def random_lora(layers: Mapping[str, tuple[int, int]], rank: int, seed: int, size: float = 0.05) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, (height, width) in layers.items():
        out[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * size
        out[f"{name}.lora_B.weight"] = torch.randn(height, rank, generator=generator) * size
    return out


def made(case: tuple[Any, int, float, bool]) -> tuple[Weights, AdapterShapes]:
    wanted, rank, alpha, clip = case
    layers = lora_layers(LINEAR, wanted) if wanted else {}
    text = clip_layers(CLIP) if clip else {}
    return (
        Weights(random_lora(layers, rank, 1), {}, random_lora(text, rank, 2, 0.3)),
        AdapterShapes(
            LoraShape(rank, alpha, 0.0, tuple(layers)) if layers else None,
            LoraShape(rank, alpha, 0.0, tuple(text)) if text else None,
        ),
    )


def wanted_changes(weights: Weights, shapes: AdapterShapes) -> dict[str, Tensor]:
    """By the definition of LoRA alone."""
    out = {}
    for prefix, lora, shape in (
        ("", weights.lora, shapes.lora),
        ("text_encoder.", weights.text_lora, shapes.text_lora),
    ):
        for name in lora:
            if shape and name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                product = lora[f"{module}.lora_B.weight"].float() @ lora[name].float()
                out[prefix + module] = shape.alpha / shape.rank * product
    return out


ABOUT = ExportInfo(
    "a", "builtin:tiny", 6, (),
    {"seed": 0, "data.resolution": 64, "data.prompt": "a thing", "data.caption_dropout": 0.0, "train.lr": 1e-3,
     "train.batch_size": 2, "train.accumulate": 1, "train.max_grad_norm": 1.0, "optimizer.name": "adamw",
     "schedule.name": "constant"},
    {"license": "apache-2.0"}, "2026-01-31", True, "0.1.0", layer_names.FLUX1,
)  # fmt: skip


def written(folder: Path, weights: Weights, shapes: AdapterShapes, dtype: torch.dtype) -> tuple[Path, Path]:
    diffusers, kohya = folder / formats.LORA_FILE, folder / "a.safetensors"
    folded, its_shapes = formats.folded(weights, shapes)
    formats.write_lora(diffusers, formats.rounded(folded, dtype), its_shapes)
    formats.write_kohya(kohya, formats.rounded(weights, dtype), shapes, ABOUT)
    return diffusers, kohya


def differs(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference; what is found and not wanted must change nothing."""
    assert wanted.keys() <= found.keys()
    return max(float((value - wanted.get(name, torch.zeros(()))).abs().max()) for name, value in found.items())


def loaded_changes(pipe: Any) -> dict[str, Tensor]:
    """What stock diffusers adds to each layer."""
    out = {}
    for prefix, model in (("", pipe.transformer), ("text_encoder.", pipe.text_encoder)):
        for name, module in model.named_modules():
            if hasattr(module, "scaling") and module.scaling:
                [adapter] = module.scaling
                up, down = module.lora_B[adapter].weight, module.lora_A[adapter].weight
                out[prefix + name] = (module.scaling[adapter] * (up.float() @ down.float())).detach()
    return out
