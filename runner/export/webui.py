"""Metadata and usage hints that WebUI, Forge and ComfyUI show for an exported file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from runner.core import safetensors
from runner.export.about import AdapterShapes, ExportInfo
from runner.model import tensors
from runner.spec.export_names import embeddings_file, file_stem, webui_file


def hashes(named: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata with hashes of the tensors alone, so that equal LoRAs have equal hashes whatever their metadata (as
    sd-scripts does)."""
    digest = safetensors.data_digest({name: tensors.raw(value) for name, value in named.items()})
    return {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}


def webui_metadata(about: ExportInfo, shapes: AdapterShapes) -> dict[str, str]:
    """Metadata as sd-scripts writes it (`ss_*`, from its train_network.py) and of ModelSpec 1.0.1. All values are
    strings; it has no path, and no time but the day of the run."""
    settings, shape, words = about.settings, shapes.lora or shapes.text_lora, webui_words(about)
    assert shape is not None  # there is an adapter, or no file
    side, names = f"{about.resolution}x{about.resolution}", about.layer_names
    named: dict[str, Any] = {
        "format": "pt",
        "ss_output_name": file_stem(about.name),  # A1111 also calls the LoRA by this name
        "ss_base_model_version": names.version,
        "ss_sd_model_name": about.base,
        "ss_v2": "False",
        "ss_network_module": names.network,
        "ss_network_dim": shape.rank,
        "ss_network_alpha": shape.alpha,
        "ss_network_dropout": shape.dropout,
        "ss_network_args": "{}",
        "ss_steps": about.step,
        "ss_max_train_steps": about.step,
        "ss_seed": settings["seed"],
        "ss_resolution": f"({about.resolution}, {about.resolution})",
        "ss_learning_rate": settings["train.lr"],
        "ss_optimizer": settings["optimizer.name"],
        "ss_lr_scheduler": settings["schedule.name"],
        "ss_batch_size_per_device": settings["train.batch_size"],
        "ss_gradient_accumulation_steps": settings["train.accumulate"],
        "ss_max_grad_norm": settings["train.max_grad_norm"],
        "ss_caption_dropout_rate": settings["data.caption_dropout"],
        "ss_training_comment": f"trained by fluxrun {about.version}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": names.architecture(about.guided),
        "modelspec.implementation": names.implementation,
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


def webui_words(about: ExportInfo) -> str | None:
    """The words to write in a WebUI's prompt: the embedding's name, or without one the caption of the training
    images."""
    if not about.placeholders:
        return about.settings.get("data.prompt")
    has_webui_file = "t5" in about.settings["inversion.encoders"]
    return Path(webui_file(about.name) if has_webui_file else embeddings_file(about.name)).stem


def usage_hint(about: ExportInfo) -> str:
    """How to write the placeholders in a prompt, in each program."""
    named = ", ".join(f"{placeholder.name} is {placeholder.text}" for placeholder in about.placeholders)
    stem = Path(embeddings_file(about.name)).stem
    return f"diffusers: {named}; ComfyUI: embedding:{stem}; WebUI: {webui_words(about)}"


def day_of(seconds: float | None) -> str | None:
    """The UTC day of a time in seconds since 1970. Only the day, because exports of equal runs should be equal to the
    byte."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).date().isoformat()
