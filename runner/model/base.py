"""An opened base model: where its parts lie and what they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

Generator = torch.Generator


@dataclass(frozen=True)
class Base:
    """A base model on this disk. `dtype` is the frozen parts' own; `device` is where they are loaded to. `quantize`: none, or
    what the transformer and T5 are held in; `cache`: the folder where they are kept so, if anywhere; `offload`: whether their
    blocks wait in host memory."""

    folder: Path
    variant: str | None
    device: torch.device
    dtype: torch.dtype
    quantize: str = "none"
    cache: Path | None = None
    offload: bool = False
