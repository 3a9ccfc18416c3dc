"""Writes trained weights as files that other programs load. `runner.export.verify` checks what was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.checkpoint.storage import Weights
from runner.data.tokens import Placeholder
from runner.export.about import AdapterShapes, ExportInfo
from runner.export.lora_layouts import TEXT, TRANSFORMER, Adapter, adapter_of, to_kohya
from runner.export.pipeline import ExportedFiles
from runner.export.webui import hashes, webui_metadata
from runner.model import tensors
from runner.model.lora import LoraShape, adapter_metadata
from runner.spec.export_names import embeddings_file, find_embeddings, webui_file

LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDDING_KEYS = {"clip": ("clip_l",), "t5": ("t5", "t5xxl")}  # diffusers reads t5, ComfyUI t5xxl


def exported_files(folder: Path, name: str, placeholders: tuple[Placeholder, ...]) -> ExportedFiles:
    """The files in a run's export folder that a pipeline loads. name: the run's."""
    lora = folder / LORA_FILE
    return ExportedFiles(lora if lora.is_file() else None, find_embeddings(folder, name), placeholders)


def rounded(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights on the CPU, rounded to the dtype of the files."""

    def to(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach().cpu().to(dtype) for name, value in named.items()}

    return Weights(to(weights.lora), to(weights.rows), to(weights.text_lora))


def adapter(weights: Weights, shapes: AdapterShapes) -> Adapter:
    """The LoRA weights as factors, with the alphas of their shapes."""
    return Adapter(
        adapter_of(weights.lora, shapes.lora.alpha) if shapes.lora else {},
        adapter_of(weights.text_lora, shapes.text_lora.alpha) if shapes.text_lora else {},
    )


def folded(weights: Weights, shapes: AdapterShapes) -> tuple[Weights, AdapterShapes]:
    """Equal adapters with alpha = rank: the scale alpha / rank is multiplied into B, in fp32, before anything is
    rounded.

    ComfyUI and Forge do not read alpha from the metadata of diffusers' layout; they take the scale for 1 (ComfyUI
    comfy/lora.py looks for alpha among the keys only).
    """
    lora, shape = _folded(weights.lora, shapes.lora)
    text_lora, text_shape = _folded(weights.text_lora, shapes.text_lora)
    return Weights(lora, weights.rows, text_lora), AdapterShapes(shape, text_shape)


def _folded(lora: Mapping[str, Tensor], shape: LoraShape | None) -> tuple[Mapping[str, Tensor], LoraShape | None]:
    if shape is None or shape.alpha == shape.rank:
        return lora, shape
    scale = shape.alpha / shape.rank
    scaled = {name: value.float() * scale if ".lora_B." in name else value for name, value in lora.items()}
    return scaled, replace(shape, alpha=float(shape.rank))


def write_lora(path: Path, weights: Weights, shapes: AdapterShapes) -> None:
    """Write diffusers' layout: `transformer.MODULE.lora_A.weight` and `.lora_B.weight`,
    `text_encoder.text_model.MODULE...`, and the adapters' configs as JSON in the metadata.

    weights, shapes: from `folded`, so that a program that reads no alpha is right, too. transformers 5 names CLIP's
    modules without `text_model`; diffusers reads both names, ComfyUI only the one with it.
    """
    named = {f"{TRANSFORMER}.{name}": value for name, value in weights.lora.items()}
    named |= {f"{TEXT}.text_model.{name}": value for name, value in weights.text_lora.items()}
    config: dict[str, Any] = {}
    for prefix, shape in ((TRANSFORMER, shapes.lora), (TEXT, shapes.text_lora)):
        config |= {f"{prefix}.{key}": value for key, value in adapter_metadata(shape).items()} if shape else {}
    tensors.save(path, named, {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True)})


def write_kohya(path: Path, weights: Weights, shapes: AdapterShapes, about: ExportInfo) -> None:
    """Write the original layout, with the metadata that WebUIs show."""
    named = to_kohya(adapter(weights, shapes), about.layer_names)
    tensors.save(path, named, {**webui_metadata(about, shapes), **hashes(named)})


def write_embeddings(folder: Path, weights: Weights, name: str) -> None:
    """Write the token embeddings, [vectors, width] per encoder, with the spec's tokens in order. If T5 has some, too,
    write a second file with CLIP's alone, which is what WebUIs load."""
    named = {key: rows for encoder, rows in weights.rows.items() for key in EMBEDDING_KEYS[encoder]}
    tensors.save(folder / embeddings_file(name), named, {"format": "pt"})
    if len(named) > 1 and "clip" in weights.rows:
        tensors.save(folder / webui_file(name), {"clip_l": weights.rows["clip"]}, {"format": "pt"})
