"""What exported files say about their run, in metadata and model card, and the shapes of their adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.data.tokens import Placeholder
from runner.model.family import LayerNames
from runner.model.lora import LoraShape


@dataclass(frozen=True)
class AdapterShapes:
    """The shapes of the transformer's LoRA and of the text encoder's. None: the run has no such LoRA."""

    lora: LoraShape | None
    text_lora: LoraShape | None


@dataclass(frozen=True)
class ExportInfo:
    """What the files say about their run.

    base: a hub id, or the name of a folder without its path. settings: the spec by dotted key, without paths. day: when
    the run began, like 2026-01-31 (UTC). guided: whether the base takes a guidance scale. layer_names: the model
    family's.
    """

    name: str
    base: str
    step: int
    placeholders: tuple[Placeholder, ...]
    settings: Mapping[str, Any]
    licence: Mapping[str, str]
    day: str | None
    guided: bool
    version: str
    layer_names: LayerNames

    @property
    def resolution(self) -> int:
        """The largest resolution trained at, in pixels."""
        resolution: int | list[int] = self.settings["data.resolution"]
        return resolution if isinstance(resolution, int) else max(resolution)
