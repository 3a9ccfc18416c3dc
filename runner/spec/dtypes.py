"""Number formats of weights: their names in a spec and in torch, their sizes, and the base model's default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Dtype = Literal["bf16", "fp16", "fp32"]
BYTES: Mapping[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
TORCH_NAMES: Mapping[str, str] = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}


def base_dtype(chosen: Dtype | None, *, on_gpu: bool) -> Dtype:
    """The frozen base's: model.dtype where it is set. bf16 halves a GPU's memory; on a CPU it is several times slower
    than fp32."""
    return chosen or ("bf16" if on_gpu else "fp32")
