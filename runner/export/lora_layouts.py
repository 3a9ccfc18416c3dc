"""The two layouts of LoRA files, diffusers' and the original one (BFL's, which kohya's sd-scripts and ComfyUI use), and
how one is converted into the other.

The original layout holds q, k and v (in a single block also the MLP's input) as one fused matrix. The adapters of its
parts become one adapter of the fused matrix without loss: `up` is block-diagonal, `down` is stacked, and alpha keeps
the scale. `LayerNames` of the model family says which matrix holds which modules. In norm_out the original layout
stores shift before scale, diffusers scale before shift (ComfyUI, comfy/utils.py, flux_to_diffusers).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runner.core.errors import BadFileError
from runner.model.family import LayerNames
from runner.model.flux1.layer_names import FLUX1

SWAPPED = "norm_out.linear"  # diffusers stores scale, shift; the original layout shift, scale
UNET, CLIP = "lora_unet_", "lora_te1_"
TRANSFORMER, TEXT = "transformer", "text_encoder"
CLIP_MODULE = re.compile(
    r"encoder[._]layers[._](\d+)[._](?:(self_attn)[._](q_proj|k_proj|v_proj|out_proj)|(mlp)[._](fc1|fc2))"
)


@dataclass(frozen=True)
class Factors:
    """LoRA of one weight [out, in]. It adds (alpha / rank) * up @ down, with down [rank, in] and up [out, rank]."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by diffusers' module names, for the transformer and for CLIP's text encoder
    ("encoder.layers.0...")."""

    transformer: Mapping[str, Factors]
    text: Mapping[str, Factors]


def adapter_of(lora: Mapping[str, Tensor], alpha: float) -> dict[str, Factors]:
    """Factors by module, from tensors named "MODULE.lora_A.weight" and "MODULE.lora_B.weight". alpha: that of all
    modules."""
    downs = {name.removesuffix(".lora_A.weight"): value for name, value in lora.items() if ".lora_A." in name}
    return {name: Factors(down, lora[f"{name}.lora_B.weight"], alpha) for name, down in downs.items()}


def difference(first: Factors, second: Factors | None) -> float:
    """The largest absolute difference between what two adapters add to a weight. None: an adapter that adds nothing.

    Both are computed in one product of their stacked factors, [out, r1 + r2] @ [r1 + r2, in].
    """
    parts = [first] if second is None else [first, Factors(second.down, -second.up, second.alpha)]
    up = torch.cat([part.scale * part.up.float() for part in parts], 1)
    low, high = torch.aminmax(up @ torch.cat([part.down.float() for part in parts]))
    return float(torch.maximum(-low, high))


# ---- modules <-> fused matrices of the original layout ---------------------------------------------------------------


def _rows(modules: tuple[str, ...], width: int, total: int | None) -> list[int]:
    """The output rows of each module in a fused matrix.

    width: the input's; q, k and v have as many rows each. total: rows of the fused matrix; the MLP has the rest, and
    four times the width if `total` is None.
    """
    if len(modules) == 1:
        assert total is not None
        return [total]
    return [width] * 3 + [(total or 7 * width) - 3 * width] * (len(modules) - 3)


def _fuse(modules: tuple[str, ...], parts: Mapping[str, Factors]) -> Factors:
    """One adapter of the fused matrix, from the adapters of some or all of its modules. Rows of the others are zero."""
    present = [parts[module] for module in modules if module in parts]
    first = present[0]
    if len(modules) == 1:
        return first if modules[0] != SWAPPED else Factors(first.down, _swap(first.up), first.alpha)
    scales = [part.scale for part in present]
    ups = [part.up for part in present]
    if len(set(scales)) > 1:  # one alpha cannot express several scales, so they are multiplied into `up`, in fp32
        ups = [up.float() * scale for up, scale in zip(ups, scales, strict=True)]
        scales = [1.0]
    mlp = parts.get(modules[-1]) if len(modules) == 4 else None
    width = first.down.shape[1]
    rows = _rows(modules, width, 3 * width + mlp.up.shape[0] if mlp else None)
    rank = sum(part.down.shape[0] for part in present)
    dtype = functools.reduce(torch.promote_types, [up.dtype for up in ups])
    up = torch.zeros(sum(rows), rank, dtype=dtype, device=ups[0].device)
    blocks = iter(ups)
    row, column = 0, 0
    for module, height in zip(modules, rows, strict=True):
        if module in parts:
            block = next(blocks)
            up[row : row + height, column : column + block.shape[1]] = block
            column += block.shape[1]
        row += height
    down = torch.cat([part.down.to(up.dtype) for part in present])
    return Factors(down, up, scales[0] * rank)


def _swap(rows: Tensor) -> Tensor:
    """Exchange the upper and the lower half of the rows. It is its own inverse."""
    upper, lower = rows.chunk(2)
    return torch.cat([lower, upper])


def split(modules: tuple[str, ...], fused: Factors) -> dict[str, Factors]:
    """The adapters of the modules in a fused matrix. They share `down`, and the `up` of some may be all zero.

    Raises BadFileError if the number of rows does not fit the modules.
    """
    if modules == (SWAPPED,):
        return {SWAPPED: Factors(fused.down, _swap(fused.up), fused.alpha)}
    rows = _rows(modules, fused.down.shape[1], fused.up.shape[0])
    if min(rows) < 1 or sum(rows) != fused.up.shape[0]:
        raise BadFileError(
            f"{modules[0]} and its neighbours: {fused.up.shape[0]} output rows do not hold {len(modules)} matrices"
        )
    ups = torch.split(fused.up, rows)
    return {module: Factors(fused.down, up, fused.alpha) for module, up in zip(modules, ups, strict=True)}


def trim(factors: Factors) -> Factors | None:
    """The adapter without the ranks whose column of `up` is zero, so that the parts of a block-diagonal `up` get back
    their own ranks. None if all of `up` is zero."""
    used = (factors.up != 0).any(0)
    if not used.any():
        return None
    return Factors(factors.down[used], factors.up[:, used], factors.scale * int(used.sum()))


# ---- the original layout as a file's tensors -------------------------------------------------------------------------


def to_kohya(adapter: Adapter, names: LayerNames = FLUX1) -> dict[str, Tensor]:
    """Tensors in the original layout: `lora_unet_MATRIX.lora_down.weight`, `.lora_up.weight` and `.alpha` (fp32), and
    for CLIP `lora_te1_text_model_...`. Raises BadFileError for a module that the layout has no name for."""
    groups: dict[str, tuple[str, ...]] = {}
    for module in adapter.transformer:
        if (fused := names.matrix_of(module)) is None:
            raise BadFileError(
                f"{module}: no layer of {names.title}'s transformer, so the original layout has no name for it"
            )
        matrix, modules = fused
        groups[matrix] = modules
    named = {f"{UNET}{matrix}": _fuse(modules, adapter.transformer) for matrix, modules in groups.items()}
    named |= {f"{CLIP}text_model_{name.replace('.', '_')}": part for name, part in adapter.text.items()}
    out: dict[str, Tensor] = {}
    for name, factors in named.items():
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = factors.down, factors.up
        out[f"{name}.alpha"] = torch.tensor(factors.alpha)
    return out


def split_kohya(named: Mapping[str, Tensor], names: LayerNames = FLUX1) -> Adapter:
    """The adapter in a file of the original layout. Modules that were not trained, but share a matrix with one that
    was, have an `up` of zeros. Raises BadFileError, with the keys, if some are unknown."""
    transformer: dict[str, Factors] = {}
    text: dict[str, Factors] = {}
    pairs, unknown = gather(named)
    for name, factors in pairs.items():
        if (module := _clip_name(name)) is not None:
            text[module] = factors
        elif name.startswith(UNET) and (modules := names.modules_of(name.removeprefix(UNET))) is not None:
            transformer |= split(modules, factors)
        else:
            unknown.append(name)
    if unknown:
        raise BadFileError(
            f"{_list_keys(unknown)}: no layer of {names.title} in the original layout (lora_unet_..., lora_te1_...)"
        )
    return Adapter(transformer, text)


def _clip_name(name: str) -> str | None:
    match = re.fullmatch(rf"{CLIP}text_model_{CLIP_MODULE.pattern}", name)
    return clip_module(match) if match else None


def clip_module(match: re.Match[str]) -> str:
    """diffusers' name of the module that `CLIP_MODULE` matched."""
    return f"encoder.layers.{match[1]}.{match[2] or match[4]}.{match[3] or match[5]}"


# ---- diffusers' layout as a file's tensors ---------------------------------------------------------------------------


def to_diffusers(adapter: Adapter) -> dict[str, Tensor]:
    """Tensors in diffusers' layout: `transformer.MODULE.lora_A.weight` and `.lora_B.weight`, and for CLIP
    `text_encoder.text_model.MODULE...`. The scale is multiplied into B, because some programs read no alpha in this
    layout. B is stored in fp32 if its dtype cannot hold the product exactly."""
    out: dict[str, Tensor] = {}
    for prefix, parts in ((TRANSFORMER, adapter.transformer), (f"{TEXT}.text_model", adapter.text)):
        for name, factors in parts.items():
            scaled = factors.up.float() * factors.scale
            exact = torch.equal(scaled.to(factors.up.dtype).float(), scaled)
            out[f"{prefix}.{name}.lora_A.weight"] = factors.down
            out[f"{prefix}.{name}.lora_B.weight"] = scaled.to(factors.up.dtype) if exact else scaled
    return out


def from_diffusers(named: Mapping[str, Tensor], config: Mapping[str, Any], names: LayerNames = FLUX1) -> Adapter:
    """The adapter in a file of diffusers' layout. config: the file's `lora_adapter_metadata`, or {}. Raises
    BadFileError, with the keys, if some are unknown."""
    transformer: dict[str, Factors] = {}
    text: dict[str, Factors] = {}
    pairs, unknown = gather(named)
    for name, pair in pairs.items():
        prefix = name.split(".")[0]
        module = name.removeprefix(f"{TRANSFORMER}.")
        clip = re.fullmatch(rf"{TEXT}\.(?:text_model\.)?{CLIP_MODULE.pattern}", name)
        alpha = stated_alpha(config, prefix, name.removeprefix(f"{prefix}."))
        factors = pair if alpha is None or f"{name}.alpha" in named else Factors(pair.down, pair.up, alpha)
        if clip:
            text[clip_module(clip)] = factors
        elif names.matrix_of(module):
            transformer[module] = factors
        else:
            unknown.append(name)
    if unknown:
        raise BadFileError(
            f"{_list_keys(unknown)}: no layer of {names.title} in diffusers' layout (transformer..., text_encoder...)"
        )
    return Adapter(transformer, text)


def stated_alpha(config: Mapping[str, Any], component: str, module: str) -> float | None:
    """A module's alpha by peft's rule: that of the first pattern which matches the end of its name, else the adapter's.
    None if the config says nothing. component: "transformer" or "text_encoder"."""
    patterns: Mapping[str, float] = config.get(f"{component}.alpha_pattern") or {}
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(value)
    alpha = config.get(f"{component}.lora_alpha")
    return None if alpha is None else float(alpha)


ENDS = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
}


def gather(named: Mapping[str, Tensor], ends: Mapping[str, str] = ENDS) -> tuple[dict[str, Factors], list[str]]:
    """(factors by module, names that belong to no complete pair). Without a stored alpha, alpha is the rank.

    ends: how the keys of a pair end -> "down", "up" or "alpha". A name is a key with an unknown end, or that of a
    module whose factors are missing or do not fit each other.
    """
    parts_of: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, value in named.items():
        end = next((end for end in ends if key.endswith(f".{end}")), None)
        if end is None:
            unknown.append(key)
        else:
            parts_of.setdefault(key.removesuffix(f".{end}"), {})[ends[end]] = value
    pairs: dict[str, Factors] = {}
    for name, parts in parts_of.items():
        down, up = parts.get("down"), parts.get("up")
        if down is None or up is None or down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            unknown.append(name)
            continue
        pairs[name] = Factors(down, up, float(parts["alpha"]) if "alpha" in parts else float(down.shape[0]))
    return pairs, unknown


def _list_keys(names: list[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
