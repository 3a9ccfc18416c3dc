"""Where foreign key names live: LoRA as diffusers and as the original (BFL) layout name it, turned into each other.

The original layout keeps q, k and v (in a single block: and the MLP's input) as one matrix. Their adapters become one
adapter of that matrix without loss: `up` block-diagonal, `down` stacked, alpha such that the scale stays.
Which matrix holds which module is the family's to say (`LayerNames`). That norm_out has scale and shift the other way round is
from ComfyUI comfy/utils.py, flux_to_diffusers.
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

SWAPPED = "norm_out.linear"  # diffusers: scale, shift; the original: shift, scale
UNET, CLIP = "lora_unet_", "lora_te1_"
TRANSFORMER, TEXT = "transformer", "text_encoder"
CLIP_MODULE = re.compile(
    r"encoder[._]layers[._](\d+)[._](?:(self_attn)[._](q_proj|k_proj|v_proj|out_proj)|(mlp)[._](fc1|fc2))"
)


@dataclass(frozen=True)
class Factors:
    """The change of one matrix: (alpha / rank) * up @ down, down [rank, in], up [out, rank]."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]


@dataclass(frozen=True)
class Adapter:
    """Factors by diffusers' module name: of the transformer, and of the CLIP encoder ("encoder.layers.0....")."""

    transformer: Mapping[str, Factors]
    text: Mapping[str, Factors]


def adapter_of(lora: Mapping[str, Tensor], alpha: float) -> dict[str, Factors]:
    """ "MODULE.lora_A.weight", "MODULE.lora_B.weight" -> factors, all with one alpha."""
    downs = {name.removesuffix(".lora_A.weight"): value for name, value in lora.items() if ".lora_A." in name}
    return {name: Factors(down, lora[f"{name}.lora_B.weight"], alpha) for name, down in downs.items()}


def difference(one: Factors, other: Factors | None) -> float:
    """The largest difference of two changes of a matrix (None: no change), as one product of both ranks together."""
    parts = [one] if other is None else [one, Factors(other.down, -other.up, other.alpha)]
    up = torch.cat([part.scale * part.up.float() for part in parts], 1)
    low, high = torch.aminmax(up @ torch.cat([part.down.float() for part in parts]))
    return float(torch.maximum(-low, high))


# ---- modules <-> the original's matrices -------------------------------------------------------------------------------


def _rows(modules: tuple[str, ...], width: int, total: int | None) -> list[int]:
    """Output rows of each module in a fused matrix: q, k and v are as wide as their input, the MLP has the rest
    (four times that, where nothing says how many)."""
    if len(modules) == 1:
        assert total is not None
        return [total]
    return [width] * 3 + [(total or 7 * width) - 3 * width] * (len(modules) - 3)


def _fuse(modules: tuple[str, ...], parts: Mapping[str, Factors]) -> Factors:
    """One adapter of the fused matrix from those of any of its parts; the others' rows stay zero."""
    present = [parts[module] for module in modules if module in parts]
    first = present[0]
    if len(modules) == 1:
        return first if modules[0] != SWAPPED else Factors(first.down, _swap(first.up), first.alpha)
    scales = [part.scale for part in present]
    ups = [part.up for part in present]
    if len(set(scales)) > 1:  # one alpha cannot hold them; fp32 can
        ups = [up.float() * scale for up, scale in zip(ups, scales, strict=True)]
        scales = [1.0]
    mlp = parts.get(modules[-1]) if len(modules) == 4 else None
    width = first.down.shape[1]
    rows = _rows(modules, width, 3 * width + mlp.up.shape[0] if mlp else None)
    rank = sum(part.down.shape[0] for part in present)
    dtype = functools.reduce(torch.promote_types, [up.dtype for up in ups])
    up = torch.zeros(sum(rows), rank, dtype=dtype, device=ups[0].device)
    at, top, column = 0, 0, 0
    for module, height in zip(modules, rows, strict=True):
        if module in parts:
            up[top : top + height, column : column + ups[at].shape[1]] = ups[at]
            column += ups[at].shape[1]
            at += 1
        top += height
    down = torch.cat([part.down.to(up.dtype) for part in present])
    return Factors(down, up, scales[0] * rank)


def _swap(rows: Tensor) -> Tensor:
    """Exchange the upper and the lower half: its own inverse."""
    upper, lower = rows.chunk(2)
    return torch.cat([lower, upper])


def split(modules: tuple[str, ...], fused: Factors) -> dict[str, Factors]:
    """The parts' adapters from the fused one's; all of them share `down`, and a part may be all zero."""
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
    """Less the columns of `up` that are all zero (a block-diagonal `up` falls apart into its blocks); None: all are."""
    used = (factors.up != 0).any(0)
    if not used.any():
        return None
    return Factors(factors.down[used], factors.up[:, used], factors.scale * int(used.sum()))


# ---- the original layout as a file's tensors -------------------------------------------------------------------------


def to_kohya(adapter: Adapter, names: LayerNames = FLUX1) -> dict[str, Tensor]:
    """`lora_unet_MATRIX.lora_down/up.weight`, `.alpha`; CLIP's as `lora_te1_text_model_...`. alpha stays fp32.

    Raises BadFileError for a module that the layout has no name for.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for module in adapter.transformer:
        if (found := names.matrix_of(module)) is None:
            raise BadFileError(
                f"{module}: no layer of {names.title}'s transformer, so the original layout has no name for it"
            )
        groups[found[0]] = found[1]
    named = {f"{UNET}{matrix}": _fuse(modules, adapter.transformer) for matrix, modules in groups.items()}
    named |= {f"{CLIP}text_model_{name.replace('.', '_')}": part for name, part in adapter.text.items()}
    out: dict[str, Tensor] = {}
    for name, factors in named.items():
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = factors.down, factors.up
        out[f"{name}.alpha"] = torch.tensor(factors.alpha)
    return out


def split_kohya(named: Mapping[str, Tensor], names: LayerNames = FLUX1) -> Adapter:
    """Every part of every matrix, the parts that were not trained as zeros. Raises BadFileError with the keys it does not know."""
    transformer: dict[str, Factors] = {}
    text: dict[str, Factors] = {}
    found, odd = gather(named)
    for name, factors in found.items():
        if (module := _clip_name(name)) is not None:
            text[module] = factors
        elif name.startswith(UNET) and (modules := names.modules_of(name.removeprefix(UNET))) is not None:
            transformer |= split(modules, factors)
        else:
            odd.append(name)
    if odd:
        raise BadFileError(
            f"{_some(odd)}: no layer of {names.title} in the original layout (lora_unet_..., lora_te1_...)"
        )
    return Adapter(transformer, text)


def _clip_name(name: str) -> str | None:
    found = re.fullmatch(rf"{CLIP}text_model_{CLIP_MODULE.pattern}", name)
    return clip_module(found) if found else None


def clip_module(found: re.Match[str]) -> str:
    return f"encoder.layers.{found[1]}.{found[2] or found[4]}.{found[3] or found[5]}"


# ---- diffusers' layout as a file's tensors ---------------------------------------------------------------------------


def to_diffusers(adapter: Adapter) -> dict[str, Tensor]:
    """`transformer.MODULE.lora_A/B.weight`, `text_encoder.text_model.MODULE...`. The scale goes into B, since not every
    reader looks for an alpha here; B is stored in fp32 where its own dtype cannot hold that exactly."""
    out: dict[str, Tensor] = {}
    for prefix, parts in ((TRANSFORMER, adapter.transformer), (f"{TEXT}.text_model", adapter.text)):
        for name, factors in parts.items():
            scaled = factors.up.float() * factors.scale
            same = torch.equal(scaled.to(factors.up.dtype).float(), scaled)
            out[f"{prefix}.{name}.lora_A.weight"] = factors.down
            out[f"{prefix}.{name}.lora_B.weight"] = scaled.to(factors.up.dtype) if same else scaled
    return out


def from_diffusers(named: Mapping[str, Tensor], config: Mapping[str, Any], names: LayerNames = FLUX1) -> Adapter:
    """`config`: what the file's `lora_adapter_metadata` holds, {} where it has none. Raises BadFileError with unknown keys."""
    transformer: dict[str, Factors] = {}
    text: dict[str, Factors] = {}
    found, odd = gather(named)
    for name, factors in found.items():
        prefix = name.split(".")[0]
        module = name.removeprefix(f"{TRANSFORMER}.")
        clip = re.fullmatch(rf"{TEXT}\.(?:text_model\.)?{CLIP_MODULE.pattern}", name)
        stated = stated_alpha(config, prefix, name.removeprefix(f"{prefix}."))
        if stated is not None and f"{name}.alpha" not in named:
            factors = Factors(factors.down, factors.up, stated)
        if clip:
            text[clip_module(clip)] = factors
        elif names.matrix_of(module):
            transformer[module] = factors
        else:
            odd.append(name)
    if odd:
        raise BadFileError(
            f"{_some(odd)}: no layer of {names.title} in diffusers' layout (transformer..., text_encoder...)"
        )
    return Adapter(transformer, text)


def stated_alpha(config: Mapping[str, Any], component: str, module: str) -> float | None:
    """peft's rule: the pattern that ends the module's name, else the adapter's own."""
    patterns: Mapping[str, float] = config.get(f"{component}.alpha_pattern") or {}
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(value)
    own = config.get(f"{component}.lora_alpha")
    return None if own is None else float(own)


ENDS = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
}


def gather(named: Mapping[str, Tensor], ends: Mapping[str, str] = ENDS) -> tuple[dict[str, Factors], list[str]]:
    """Factors by module, alpha = rank where none is stored; and the keys that are no part of a whole pair."""
    found: dict[str, dict[str, Tensor]] = {}
    odd: list[str] = []
    for key, value in named.items():
        end = next((end for end in ends if key.endswith(f".{end}")), None)
        if end is None:
            odd.append(key)
        else:
            found.setdefault(key.removesuffix(f".{end}"), {})[ends[end]] = value
    whole: dict[str, Factors] = {}
    for name, parts in found.items():
        down, up = parts.get("down"), parts.get("up")
        if down is None or up is None or down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            odd.append(name)
            continue
        whole[name] = Factors(down, up, float(parts["alpha"]) if "alpha" in parts else float(down.shape[0]))
    return whole, odd


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
