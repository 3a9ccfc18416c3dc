"""What an exported file is about: the adapter's shapes, and what metadata and model card say of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.data.tokens import Placeholder
from runner.model.family import LayerNames
from runner.model.lora import LoraShape


@dataclass(frozen=True)
class AdapterShapes:
    """Of the adapters that there are."""

    lora: LoraShape | None
    text_lora: LoraShape | None


@dataclass(frozen=True)
class ExportInfo:
    """What the files tell of their run. `base`: a hub id, or a folder's name alone; `settings`: the spec by dotted key,
    without paths; `day`: on which the run began, 2026-01-31 (UTC); `guided`: whether the base takes a guidance;
    `layer_names`: the family's."""

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
        """The largest one trained at."""
        own: int | list[int] = self.settings["data.resolution"]
        return own if isinstance(own, int) else max(own)
