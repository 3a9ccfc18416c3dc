"""Loading one frozen part of a base in diffusers' layout: whole, or tensor by tensor and quantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from runner.base.files import fingerprint
from runner.core.errors import FluxrunError
from runner.core.hashing import content_key
from runner.model import quantization
from runner.model.base import Base


def load_part(kind: Any, base: Base, part: str) -> nn.Module:
    """One frozen part on the base's device, by its library class. part: the name of its folder."""
    weights_folder(base, part)
    loaded = kind.from_pretrained(
        base.folder, subfolder=part, dtype=base.dtype, variant=base.variant, use_safetensors=True
    )
    frozen: nn.Module = loaded.to(base.device).requires_grad_(False).eval()
    return frozen


def load_large_part(kind: Any, empty: Callable[[Path], Any], base: Base, part: str) -> nn.Module:
    """A transformer or large text encoder: quantized where the base says so, in host memory where its blocks will wait
    there.

    On a CPU its tensors are the file's own pages where they need not be changed. empty: folder -> the model without
    weights.
    """
    if base.offload:
        base = replace(base, device=torch.device("cpu"))
    if base.quantize == "none" and base.device.type == "cpu":
        return load_part(kind, base, part)
    return load_streaming(empty, base, part)


def load_streaming(empty: Callable[[Path], Any], base: Base, part: str) -> nn.Module:
    """The same, tensor by tensor straight to the device, so that host memory never holds more than one.

    Raises FluxrunError for missing weights, BadFileError for a file that lacks a tensor.
    """
    folder = weights_folder(base, part)
    with torch.device("meta"):
        model = empty(folder)
    quantized_file = None
    if base.quantize != "none" and base.cache:
        key = content_key(
            "quantized", quantization.FORMAT, fingerprint(folder), base.variant, base.quantize, str(base.dtype)
        )
        quantized_file = base.cache / "quantized" / key[:2] / f"{key}.safetensors"
    return quantization.load_quantized(
        model, weight_files(folder, base.variant), base.quantize, base.dtype, base.device, quantized_file
    )


def weights_folder(base: Base, part: str) -> Path:
    """The part's folder. Raises FluxrunError where its weights are no safetensors: the libraries would read a pickle,
    which can run any code."""
    folder = base.folder / part
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise FluxrunError(
            f"model.base: {folder} has no .safetensors file; other weights (.bin, .ckpt) can run code when they are read, "
            "so fluxrun does not: save the model again with safe_serialization=True"
        )
    return folder


def weight_files(folder: Path, variant: str | None) -> dict[str, Path]:
    """The file of each tensor of a part, as the libraries choose it: the one file, or an index beside several. Raises
    FluxrunError where there is neither."""
    mark = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        whole, index = folder / f"{stem}{mark}.safetensors", folder / f"{stem}.safetensors.index{mark}.json"
        if whole.is_file():
            with safe_open(whole, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), whole)
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return {name: folder / Path(file).name for name, file in weight_map.items()}
    names = ", ".join(sorted(path.name for path in folder.glob("*.safetensors*"))) or "none"
    raise FluxrunError(f"model.variant: {folder} has no such weights (found {variant!r}); its files are: {names}")
