"""Reads LoRA files of FLUX.1 in the layouts of other trainers, and says what a file holds that is no such LoRA.

A key is PREFIX + MODULE + END. Prefixes and ends are in the tables below. A module is one of the original layout (q, k
and v in one matrix), one of diffusers', or one of x-flux's processors; its parts are joined by dots or by underscores.
Sources of the names: ComfyUI comfy/lora.py and lora_convert.py (which prefixes it takes, x-flux's processors, BFL's
control LoRAs), diffusers loaders/lora_conversion_utils.py (OneTrainer's `lora_transformer_`, fal's
`base_model.model.`), sd-scripts networks/lora_flux.py (`lora_te3_` is T5), OneTrainer (`lora_te2_` is T5), LyCORIS
(`lycoris_`; the ends of its kinds).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runner.core.errors import BadFileError
from runner.core.humanize import pluralize
from runner.export.foreign_kinds import KINDS, OTHER_MODELS, OTHER_WIDTHS, UNKNOWN, Kind
from runner.export.lora_layouts import (
    CLIP_MODULE,
    TEXT,
    TRANSFORMER,
    Adapter,
    Factors,
    clip_module,
    gather,
    split,
    stated_alpha,
    trim,
)
from runner.model.flux1.layer_names import AROUND, DOUBLE, QKV, SINGLE, modules_of

PREFIXES = (
    "base_model.model.transformer.", "base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.",
    "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
CLIP_PREFIXES = (
    "text_encoder.", "lora_te1_", "lora_te_", "text_encoders.clip_l.transformer.", "base_model.model.text_encoder.",
)  # fmt: skip
ENDS = {
    "lora_A.weight": "down", "lora_A.default.weight": "down", "lora_down.weight": "down", "lora.down.weight": "down",
    "lora_linear_layer.down.weight": "down", "down.weight": "down",
    "lora_B.weight": "up", "lora_B.default.weight": "up", "lora_up.weight": "up", "lora.up.weight": "up",
    "lora_linear_layer.up.weight": "up", "up.weight": "up",
    "alpha": "alpha",
}  # fmt: skip
# x-flux's processors have one adapter for q, k and v. In single blocks it does not cover the MLP.
XFLUX_DOUBLE = {
    "processor_qkv_lora1": QKV,
    "processor_qkv_lora2": DOUBLE["txt_attn_qkv"],
    "processor_proj_lora1": DOUBLE["img_attn_proj"],
    "processor_proj_lora2": DOUBLE["txt_attn_proj"],
}
XFLUX_SINGLE = {"processor_qkv_lora": QKV, "processor_proj_lora": SINGLE["linear2"]}
BLOCKS = {"transformer_blocks": 19, "single_transformer_blocks": 38}  # how many FLUX.1 has


SHOWN = 3  # how many keys of each kind a message names


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    adapter: its LoRA, without ranks and modules that add nothing. left_out: the other keys, by kind. zeros: keys
    outside the adapter that add nothing.
    """

    adapter: Adapter
    left_out: Mapping[Kind, tuple[str, ...]]
    zeros: tuple[str, ...]

    def describe_left_out(self) -> str:
        return "; ".join(f"{kind.name} ({count_and_list(keys)})" for kind, keys in self.left_out.items())


def read(named: Mapping[str, Tensor], config: Mapping[str, Any]) -> Contents:
    """Read a LoRA in any layout. config: the file's `lora_adapter_metadata`, or {}.

    Raises BadFileError, with the key, for NaN and infinite values, an alpha of 0, and two adapters of one layer.
    """
    refuse_not_finite(named)
    # fp8, for which torch has few operations
    widened = {key: value.float() if value.element_size() == 1 else value for key, value in named.items()}
    pairs, unknown = gather(widened, ENDS)
    transformer: dict[str, Factors] = {}
    text: dict[str, Factors] = {}
    for stem, factors in pairs.items():
        if (module := _clip_name(stem)) is not None:
            text[module] = _with_stated_alpha(factors, config, TEXT, stem, named)
        elif (modules := _modules(stem)) is not None:
            parts = split(modules, _with_stated_alpha(factors, config, TRANSFORMER, stem, named))
            if repeated := [part for part in parts if part in transformer]:
                raise BadFileError(f"{stem}: another key is an adapter of {repeated[0]} too; one file holds one LoRA")
            transformer |= parts
        else:
            unknown.append(stem)
    keys = list(_keys_of(unknown, named))
    zeros = [key for key in keys if _adds_nothing(key, named, pairs)]
    adapter = Adapter(_trimmed(transformer), _trimmed(text))
    return Contents(adapter, _by_kind([key for key in keys if key not in zeros], named, adapter), tuple(zeros))


def refuse_not_finite(named: Mapping[str, Tensor]) -> None:
    """Raises BadFileError with the first keys that hold NaN or infinite values."""
    bad: dict[str, list[str]] = {}
    for key, value in named.items():
        if value.is_floating_point():
            widened = value.float()
            for what, mask in (("NaN", widened.isnan()), ("infinite values", widened.isinf())):
                if mask.any():
                    bad.setdefault(what, []).append(f"{key}, {int(mask.sum())} of {value.numel()}")
    if bad:
        problems = "; ".join(f"{what} in {_list_some(places)}" for what, places in bad.items())
        raise BadFileError(f"{problems}; a LoRA with such values draws nothing, so use an earlier step's")


def _refuse_alpha_of_zero(stem: str, factors: Factors) -> None:
    """Programs disagree on alpha 0: sd-scripts (networks/lora_flux.py, LoRAModule) uses the rank instead; by the
    formula, and in other programs, the adapter then adds nothing."""
    if factors.alpha == 0 and factors.up.any():
        raise BadFileError(
            f"{stem}: its alpha is 0, which sd-scripts takes as the rank ({factors.down.shape[0]}) and other programs as no "
            "change at all; write the alpha that is meant into the file, or take the layer out"
        )


def _trimmed(parts: Mapping[str, Factors]) -> dict[str, Factors]:
    return {name: trimmed for name, part in parts.items() if (trimmed := trim(part)) is not None}


def _with_stated_alpha(
    factors: Factors, config: Mapping[str, Any], component: str, stem: str, named: Mapping[str, Tensor]
) -> Factors:
    """The factors with the alpha that the config states, unless the file has a tensor for it."""
    alpha = stated_alpha(config, component, stem.removeprefix("base_model.model.").removeprefix(f"{component}."))
    if alpha is not None and f"{stem}.alpha" not in named:
        factors = Factors(factors.down, factors.up, alpha)
    _refuse_alpha_of_zero(stem, factors)
    return factors


# ---- names -------------------------------------------------------------------------------------------------------------


def _clip_name(stem: str) -> str | None:
    for prefix in CLIP_PREFIXES:
        match = re.fullmatch(rf"(?:text_model[._])?{CLIP_MODULE.pattern}", stem.removeprefix(prefix))
        if stem.startswith(prefix) and match:
            return clip_module(match)
    return None


def _modules(stem: str) -> tuple[str, ...] | None:
    """The modules of diffusers' transformer that an adapter covers, in the order of its output rows. None: unknown."""
    for prefix in (*PREFIXES, ""):
        if stem.startswith(prefix):
            path = stem.removeprefix(prefix).replace(".", "_")
            if (modules := modules_of(path) or _UNDERSCORED.get(path) or _in_block(path)) is not None:
                return modules
    return None


def _in_block(path: str) -> tuple[str, ...] | None:
    match = re.fullmatch(r"((?:single_|double_|single_transformer_|transformer_)blocks)_(\d+)_(.+)", path)
    if match is None or (table := _PARTS.get(match[1])) is None or match[3] not in table:
        return None
    block, parts = table[match[3]]
    return tuple(f"{block}.{match[2]}.{part}" for part in parts)


def _underscored(block: str, table: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {part.replace(".", "_"): (block, (part,)) for parts in table.values() for part in parts}


_UNDERSCORED = {module.replace(".", "_"): (module,) for module in AROUND.values()}
_PARTS = {
    "transformer_blocks": _underscored("transformer_blocks", DOUBLE),
    "single_transformer_blocks": _underscored("single_transformer_blocks", SINGLE),
    "double_blocks": {name: ("transformer_blocks", parts) for name, parts in XFLUX_DOUBLE.items()},
    "single_blocks": {name: ("single_transformer_blocks", parts) for name, parts in XFLUX_SINGLE.items()},
}


# ---- what else a file holds --------------------------------------------------------------------------------------------


def _keys_of(stems: list[str], named: Mapping[str, Tensor]) -> Iterator[str]:
    """The keys that are one of the stems, or begin with one and a dot."""
    for key in named:
        if any(key == stem or key.startswith(f"{stem}.") for stem in stems):
            yield key


def _adds_nothing(key: str, named: Mapping[str, Tensor], pairs: Mapping[str, Factors]) -> bool:
    """Whether a key is a bias or a difference of zeros, or belongs to a pair whose `up` is zero."""
    pair = next((pairs[key.removesuffix(f".{end}")] for end in ENDS if key.removesuffix(f".{end}") in pairs), None)
    if pair is not None:
        return not torch.count_nonzero(pair.up)
    return re.search(r"(\.bias|\.diff_b|\.diff)$", key) is not None and not torch.count_nonzero(named[key])


def _by_kind(keys: list[str], named: Mapping[str, Tensor], adapter: Adapter) -> dict[Kind, tuple[str, ...]]:
    """The keys by what they are."""
    model = next((kind for kind in OTHER_MODELS if any(re.search(kind.pattern, key) for key in keys)), None)
    out: dict[Kind, list[str]] = {}
    if (other := _other_model(adapter)) is not None:
        out[Kind("", other)] = [key for key in named if not key.endswith(".alpha")]
        return {kind: tuple(keys_of_kind) for kind, keys_of_kind in out.items()}
    for key in keys:
        kind = next((kind for kind in KINDS if re.search(kind.pattern, key)), None)
        if kind is None and key.endswith(".alpha"):
            continue  # its pair, or another key of its kind, is listed
        out.setdefault(kind or _broken_pair(key, named) or model or UNKNOWN, []).append(key)
    return {kind: tuple(keys_of_kind) for kind, keys_of_kind in out.items()}


def _broken_pair(key: str, named: Mapping[str, Tensor]) -> Kind | None:
    """What is wrong with the pair that a key is half of. None if the key is not of a layer of FLUX.1."""
    end = next((end for end in ENDS if key.endswith(f".{end}")), None)
    if end is None:
        return None
    stem = key.removesuffix(f".{end}")
    if _clip_name(stem) is None and _modules(stem) is None:
        return None
    halves = {ENDS[end]: named[f"{stem}.{end}"] for end in ENDS if f"{stem}.{end}" in named}
    if "down" not in halves or "up" not in halves:
        return Kind("", "half of a pair, whose other half is missing")
    if halves["down"].ndim != 2 or halves["up"].ndim != 2:
        return Kind("", "a pair that is not of two matrices")
    down, up = halves["down"].shape[0], halves["up"].shape[1]
    return Kind("", f"a pair whose ranks do not match, {down} and {up}")


def _other_model(adapter: Adapter) -> str | None:
    """Which other model an adapter is for whose layers have the names of FLUX.1's. Width and number of blocks tell."""
    for module, factors in adapter.transformer.items():
        block, _, rest = module.partition(".")
        number = rest.partition(".")[0]
        if block in BLOCKS and int(number) >= BLOCKS[block]:
            return f"a LoRA of another model ({block}.{number}; FLUX.1 has {BLOCKS[block]} of these)"
        if block == "transformer_blocks" and rest.endswith("attn.to_q") and factors.down.shape[1] in OTHER_WIDTHS:
            return OTHER_WIDTHS[factors.down.shape[1]]
    return None


def count_and_list(keys: tuple[str, ...]) -> str:
    """ "5 keys: A, B, C and 2 more"."""
    return f"{pluralize(len(keys), 'key')}: {_list_some(list(keys))}"


def _list_some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
