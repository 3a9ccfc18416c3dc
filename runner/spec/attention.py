"""The attention backends of diffusers that can train FLUX.1 on a CPU or an NVIDIA GPU, by diffusers' names.

Left out are sage and _flash_3 (no backward pass), the *_hub ones (they run code from the hub), flex (slow unless
compiled by itself), the varlen ones (for masks, of which FLUX has none), and those for other devices.
"""

from __future__ import annotations

from typing import Literal, get_args

Attention = Literal[
    "native", "flash", "xformers", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"
]  # fmt: skip
BACKENDS: tuple[str, ...] = get_args(Attention)
PACKAGES = {"flash": ("flash_attn", "flash-attn>=2.6.3"), "xformers": ("xformers", "xformers>=0.0.29")}
GPU_ONLY = ("flash", "xformers", "_native_cudnn", "_native_efficient")
HALF_PRECISION_ONLY = ("flash", "_native_cudnn")  # bf16 and fp16
