"""Trained weights as files that other programs load; what each file must hold is checked by `runner.verify`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner import files, tensors
from runner.checkpoint import Weights
from runner.exportnames import embeddings_file, file_stem, find_embeddings, webui_file
from runner.layouts import TEXT, TRANSFORMER, Adapter, adapter_of, to_kohya
from runner.lora import LoraShape, adapter_metadata
from runner.sample import Exported
from runner.tokens import Placeholder

LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDDING_KEYS = {"clip": ("clip_l",), "t5": ("t5", "t5xxl")}  # diffusers reads t5, ComfyUI asks for t5xxl


def exported_files(folder: Path, name: str, placeholders: tuple[Placeholder, ...]) -> Exported:
    """What of a run's export folder a pipeline loads."""
    lora = folder / LORA_FILE
    return Exported(lora if lora.is_file() else None, find_embeddings(folder, name), placeholders)


@dataclass(frozen=True)
class Shapes:
    """Of the adapters that there are."""

    lora: LoraShape | None
    text_lora: LoraShape | None


@dataclass(frozen=True)
class About:
    """What the files tell of their run. `base`: a hub id, or a folder's name alone; `settings`: the spec by dotted key,
    without paths; `day`: on which the run began, 2026-01-31 (UTC); `guided`: whether the base takes a guidance."""

    name: str
    base: str
    step: int
    placeholders: tuple[Placeholder, ...]
    settings: Mapping[str, Any]
    licence: Mapping[str, str]
    day: str | None
    guided: bool
    version: str

    @property
    def resolution(self) -> int:
        """The largest one trained at."""
        own: int | list[int] = self.settings["data.resolution"]
        return own if isinstance(own, int) else max(own)


def rounded(weights: Weights, dtype: torch.dtype) -> Weights:
    """As the files hold them."""

    def to(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach().cpu().to(dtype) for name, value in named.items()}

    return Weights(to(weights.lora), to(weights.rows), to(weights.text_lora))


def adapter(weights: Weights, shapes: Shapes) -> Adapter:
    return Adapter(
        adapter_of(weights.lora, shapes.lora.alpha) if shapes.lora else {},
        adapter_of(weights.text_lora, shapes.text_lora.alpha) if shapes.text_lora else {},
    )


def folded(weights: Weights, shapes: Shapes) -> tuple[Weights, Shapes]:
    """The same change of every layer with alpha = rank: the scale alpha / rank is multiplied into B, in fp32, before
    anything is rounded. ComfyUI and Forge read no alpha from the metadata of diffusers' layout and take the scale for 1
    (ComfyUI comfy/lora.py: an alpha is a key of its own, or there is none)."""
    lora, shape = _folded(weights.lora, shapes.lora)
    text_lora, text_shape = _folded(weights.text_lora, shapes.text_lora)
    return Weights(lora, weights.rows, text_lora), Shapes(shape, text_shape)


def _folded(lora: Mapping[str, Tensor], shape: LoraShape | None) -> tuple[Mapping[str, Tensor], LoraShape | None]:
    if shape is None or shape.alpha == shape.rank:
        return lora, shape
    scale = shape.alpha / shape.rank
    scaled = {name: value.float() * scale if ".lora_B." in name else value for name, value in lora.items()}
    return scaled, replace(shape, alpha=float(shape.rank))


def write_lora(path: Path, weights: Weights, shapes: Shapes) -> None:
    """diffusers' layout: `transformer.<module>.lora_A/B.weight`, `text_encoder.text_model.<module>...`, the adapters'
    configs as JSON in the metadata. `weights` and `shapes` are `folded`, so that a reader needs no alpha. transformers 5
    names CLIP's modules without `text_model`; stock diffusers reads both, ComfyUI only that."""
    named = {f"{TRANSFORMER}.{name}": value for name, value in weights.lora.items()}
    named |= {f"{TEXT}.text_model.{name}": value for name, value in weights.text_lora.items()}
    described: dict[str, Any] = {}
    for prefix, shape in ((TRANSFORMER, shapes.lora), (TEXT, shapes.text_lora)):
        described |= {f"{prefix}.{key}": value for key, value in adapter_metadata(shape).items()} if shape else {}
    tensors.save(path, named, {"format": "pt", "lora_adapter_metadata": json.dumps(described, sort_keys=True)})


def write_kohya(path: Path, weights: Weights, shapes: Shapes, about: About) -> None:
    """The original layout, with the metadata that WebUIs show."""
    named = to_kohya(adapter(weights, shapes))
    tensors.save(path, named, {**webui_metadata(about, shapes), **hashes(named)})


def write_embeddings(folder: Path, weights: Weights, name: str) -> None:
    """Rows in the order of the specs' tokens, [vectors, width] per encoder."""
    named = {key: rows for encoder, rows in weights.rows.items() for key in EMBEDDING_KEYS[encoder]}
    tensors.save(folder / embeddings_file(name), named, {"format": "pt"})
    if len(named) > 1 and "clip" in weights.rows:
        tensors.save(folder / webui_file(name), {"clip_l": weights.rows["clip"]}, {"format": "pt"})


def hashes(named: Mapping[str, Tensor]) -> dict[str, str]:
    """Of the tensors alone, so that equal LoRAs have equal hashes whatever their metadata says (sd-scripts' rule)."""
    digest = files.data_digest({name: tensors.raw(value) for name, value in named.items()})
    return {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}


def webui_metadata(about: About, shapes: Shapes) -> dict[str, str]:
    """sd-scripts' `ss_*` (its train_network.py) and ModelSpec 1.0.1; strings all, no path, no clock but the run's day."""
    own, shape, words = about.settings, shapes.lora or shapes.text_lora, webui_words(about)
    assert shape is not None  # there is an adapter, or no file
    side = f"{about.resolution}x{about.resolution}"
    named: dict[str, Any] = {
        "format": "pt",
        "ss_output_name": file_stem(about.name),  # A1111 also calls the LoRA by this name
        "ss_base_model_version": "flux1",
        "ss_sd_model_name": about.base,
        "ss_v2": "False",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": shape.rank,
        "ss_network_alpha": shape.alpha,
        "ss_network_dropout": shape.dropout,
        "ss_network_args": "{}",
        "ss_steps": about.step,
        "ss_max_train_steps": about.step,
        "ss_seed": own["seed"],
        "ss_resolution": f"({about.resolution}, {about.resolution})",
        "ss_learning_rate": own["train.lr"],
        "ss_optimizer": own["optimizer.name"],
        "ss_lr_scheduler": own["schedule.name"],
        "ss_batch_size_per_device": own["train.batch_size"],
        "ss_gradient_accumulation_steps": own["train.accumulate"],
        "ss_max_grad_norm": own["train.max_grad_norm"],
        "ss_caption_dropout_rate": own["data.caption_dropout"],
        "ss_training_comment": f"trained by fluxrun {about.version}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"flux-1-{'dev' if about.guided else 'schnell'}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": about.name,
        "modelspec.resolution": side,
        "modelspec.description": f"LoRA of {about.base}, step {about.step}, trained by fluxrun",
    }
    if licence := about.licence.get("license_name") or about.licence.get("license"):
        named["modelspec.license"] = licence
    if words:
        named["modelspec.trigger_phrase"] = words
        named["ss_tag_frequency"] = json.dumps({about.name: {words: 1}})
    if about.placeholders:
        named["modelspec.usage_hint"] = usage_hint(about)
    if about.day:
        named["modelspec.date"] = about.day
        midnight = datetime.fromisoformat(about.day).replace(tzinfo=UTC)
        named["ss_training_started_at"] = int(midnight.timestamp())
    return {key: str(value) for key, value in named.items()}


def webui_words(about: About) -> str | None:
    """What to write in a WebUI's prompt beside the LoRA: the embedding's name, or what the pictures were called."""
    if not about.placeholders:
        return about.settings.get("data.prompt")
    several = "t5" in about.settings["inversion.encoders"]
    return Path(webui_file(about.name) if several else embeddings_file(about.name)).stem


def usage_hint(about: About) -> str:
    named = ", ".join(f"{one.name} is {one.text}" for one in about.placeholders)
    stem = Path(embeddings_file(about.name)).stem
    return f"diffusers: {named}; ComfyUI: embedding:{stem}; WebUI: {webui_words(about)}"


def day_of(seconds: float | None) -> str | None:
    """The UTC day of a time. A day and no more: exports of equal runs are equal to the byte, and a run that is resumed
    keeps the day it began."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).date().isoformat()
