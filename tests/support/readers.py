"""How other programs read our files, written down from what their sources do. Independent of
`runner.export.lora_layouts`.

ComfyUI: comfy/lora.py (alpha / rows of lora_down; every weight of the original layout by its name, dots as
underscores), comfy/utils.py flux_to_diffusers (which rows of which matrix a module of diffusers is), comfy/sd1_clip.py
load_embed and process_tokens, comfy/text_encoders/flux.py (the keys asked for). Forge:
backend/text_processing/textual_inversion.py. diffusers: its own reader, with nothing but its built-in width of
FLUX.1-dev replaced by the miniature's.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

Change = tuple[str, int, int]  # matrix of the original layout, first row, rows


def comfyui_rows(config: Mapping[str, Any]) -> dict[str, Change]:
    """diffusers' module -> the rows that ComfyUI gives it in the original layout."""
    d = config["attention_head_dim"] * config["num_attention_heads"]
    rows: dict[str, Change] = {}
    for index in range(config["num_layers"]):
        ours, theirs = f"transformer_blocks.{index}", f"double_blocks.{index}"
        for number, letter in enumerate("qkv"):
            rows[f"{ours}.attn.to_{letter}"] = (f"{theirs}.img_attn.qkv", number * d, d)
            rows[f"{ours}.attn.add_{letter}_proj"] = (f"{theirs}.txt_attn.qkv", number * d, d)
        for name, matrix, height in (
            ("attn.to_out.0", "img_attn.proj", d), ("attn.to_add_out", "txt_attn.proj", d),
            ("norm1.linear", "img_mod.lin", 6 * d), ("norm1_context.linear", "txt_mod.lin", 6 * d),
            ("ff.net.0.proj", "img_mlp.0", 4 * d), ("ff.net.2", "img_mlp.2", d),
            ("ff_context.net.0.proj", "txt_mlp.0", 4 * d), ("ff_context.net.2", "txt_mlp.2", d),
        ):  # fmt: skip
            rows[f"{ours}.{name}"] = (f"{theirs}.{matrix}", 0, height)
    for index in range(config["num_single_layers"]):
        ours, theirs = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
        for number, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
            rows[f"{ours}.{name}"] = (f"{theirs}.linear1", number * d, d)
        rows[f"{ours}.proj_mlp"] = (f"{theirs}.linear1", 3 * d, 4 * d)
        rows[f"{ours}.norm.linear"] = (f"{theirs}.modulation.lin", 0, 3 * d)
        rows[f"{ours}.proj_out"] = (f"{theirs}.linear2", 0, d)
    for name, matrix, height in (
        ("x_embedder", "img_in", d), ("context_embedder", "txt_in", d),
        ("proj_out", "final_layer.linear", config["in_channels"]),
        ("norm_out.linear", "final_layer.adaLN_modulation.1", 2 * d),
    ):  # fmt: skip
        rows[name] = (matrix, 0, height)
    for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for number, side in ((1, "in"), (2, "out")):
            rows[f"time_text_embed.{ours}_embedder.linear_{number}"] = (f"{theirs}_in.{side}_layer", 0, d)
    return rows


def comfyui_changes(named: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The change of every module of diffusers that the file touches; asserts that no key is left over."""
    left = dict(named)
    whole: dict[str, Tensor] = {}
    rows = comfyui_rows(config)
    for matrix, _, _ in rows.values():
        key = f"lora_unet_{matrix.replace('.', '_')}"
        if f"{key}.lora_up.weight" in left:
            whole[matrix] = _change(left, key)
    clip = {}
    for layer in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            key = f"lora_te1_text_model_encoder_layers_{layer}_self_attn_{name}"
            if f"{key}.lora_up.weight" in left:
                clip[f"text_encoder.encoder.layers.{layer}.self_attn.{name}"] = _change(left, key)
    assert not left, f"lora key not loaded: {sorted(left)}"
    out = {}
    for module, (matrix, first, height) in rows.items():
        if matrix in whole:
            part = whole[matrix][first : first + height]
            out[module] = torch.cat(part.chunk(2)[::-1]) if module == "norm_out.linear" else part
    for matrix, value in whole.items():
        assert value.shape[0] == sum(height for one, _, height in rows.values() if one == matrix), matrix
    return out | clip


def _change(left: dict[str, Tensor], key: str) -> Tensor:
    up, down = left.pop(f"{key}.lora_up.weight").float(), left.pop(f"{key}.lora_down.weight").float()
    alpha = left.pop(f"{key}.alpha").item()
    return alpha / down.shape[0] * (up @ down)


def comfyui_direct_changes(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of diffusers' layout: it looks for `MODULE.alpha`, never into the metadata, and takes the scale for 1 without
    one."""
    out = {}
    for key, up in named.items():
        if key.endswith(".lora_B.weight"):
            stem = key.removesuffix(".lora_B.weight")
            down = named[f"{stem}.lora_A.weight"].float()
            scale = float(named[f"{stem}.alpha"]) / down.shape[0] if f"{stem}.alpha" in named else 1.0
            out[stem.removeprefix("transformer.").replace(".text_model.", ".")] = scale * (up.float() @ down)
    return out


def comfyui_embedding(file: Path, key: str, width: int) -> Tensor | None:
    """`key`: clip_l or t5xxl. The file's first tensor stands in for a key that is not there; rows of another width are
    left out of the prompt, with a warning."""
    named = load_file(file)
    rows = named[key] if key in named else next(iter(named.values()))
    return rows if rows.shape[1] == width else None


def forge_embedding(file: Path) -> Tensor:
    named = load_file(file)
    if {"clip_g", "clip_l"} <= named.keys():
        raise NotImplementedError("an SDXL embedding")
    assert len(named) == 1, "embedding file has multiple terms in it"
    [rows] = named.values()
    return rows.unsqueeze(0).float() if rows.ndim == 1 else rows.float()


def diffusers_reads_kohya(patch: pytest.MonkeyPatch, width: int | None = None) -> Any:
    """diffusers' own converter, strict: whatever it would only warn of is an error. With `width`, in the place of
    FLUX.1-dev's 3072, which it has written out."""
    from diffusers.loaders import lora_conversion_utils, lora_pipeline, peft
    from diffusers.utils import peft_utils

    def complain(text: Any, *_: Any, **__: Any) -> None:
        if "No LoRA keys associated to" not in str(text):  # of the encoder, or the transformer, that has no LoRA
            raise AssertionError(text)

    for module in (lora_conversion_utils, peft, peft_utils):
        patch.setattr(module.logger, "warning", complain)
    reader = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers
    if width is not None:
        code = _with_width(reader.__code__, width)
        assert code != reader.__code__
        reader = types.FunctionType(code, reader.__globals__)
    patch.setattr(lora_pipeline, "_convert_kohya_flux_lora_to_diffusers", reader)
    return reader


def _with_width(code: types.CodeType, d: int) -> types.CodeType:
    def other(value: Any) -> Any:
        if isinstance(value, types.CodeType):
            return _with_width(value, d)
        return (d, d, d, 4 * d) if value == (3072, 3072, 3072, 12288) else value

    return code.replace(co_consts=tuple(other(value) for value in code.co_consts))
