"""LoRA files of FLUX.1 as other trainers write them, read into one form; and the names of what is something else.

A key is PREFIX + MODULE + END. The prefixes and ends are tables; a module is one of the original layout (q, k and v in one
matrix), one of diffusers', or one of x-flux's processors, with dots or with underscores for them.
Names after: ComfyUI comfy/lora.py and lora_convert.py (which prefixes it takes, x-flux's processors, BFL's control LoRAs),
diffusers loaders/lora_conversion_utils.py (OneTrainer's `lora_transformer_`, fal's `base_model.model.`), sd-scripts
networks/lora_flux.py (`lora_te3_` is T5), OneTrainer (`lora_te2_` is T5), LyCORIS (`lycoris_`; the ends of its kinds).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runner.core.errors import BadFileError
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
# x-flux's processors hold one adapter of q, k and v; a single block's has none of its MLP.
XFLUX_DOUBLE = {
    "processor_qkv_lora1": QKV,
    "processor_qkv_lora2": DOUBLE["txt_attn_qkv"],
    "processor_proj_lora1": DOUBLE["img_attn_proj"],
    "processor_proj_lora2": DOUBLE["txt_attn_proj"],
}
XFLUX_SINGLE = {"processor_qkv_lora": QKV, "processor_proj_lora": SINGLE["linear2"]}
BLOCKS = {"transformer_blocks": 19, "single_transformer_blocks": 38}  # of FLUX.1


@dataclass(frozen=True)
class Kind:
    """What a key is that is no LoRA of FLUX.1's transformer or CLIP. `beside`: the rest is a whole LoRA without it."""

    pattern: str
    name: str
    beside: bool = False


OTHER_MODELS = (
    Kind(r"lora_unet_(input|middle|output)_blocks?_|lora_te2_text_model_|text_encoder_2\.text_model\.", "an SDXL LoRA"),
    Kind(r"(lora_unet_|unet\.|^)(down|mid|up)_blocks?[_.]", "a LoRA of Stable Diffusion 1, 2 or XL"),
    Kind(r"joint_blocks[_.]", "an SD3 LoRA"),
    Kind(r"joint_transformer_blocks[_.]", "an AuraFlow LoRA"),
    Kind(r"(double|single)_stream_blocks[_.]", "a HiDream LoRA"),
    Kind(
        r"^(transformer\.|diffusion_model\.|lora_unet__?|lycoris_)?blocks[_.]\d+[_.](self_attn|cross_attn|attn[12]|ffn)",
        "a Wan LoRA",
    ),
    Kind(r"transformer_blocks[_.]\d+[_.]attn[12][_.]", "an LTX or PixArt LoRA"),
    Kind(r"transformer_blocks[_.]\d+[_.](img|txt)_(mlp[_.]net|mod[_.]1)", "a Qwen-Image LoRA"),
    Kind(r"(img|txt)_mlp[_.]fc[12]|individual_token_refiner|(img|txt)_mod[_.]linear", "a HunyuanVideo LoRA"),
    Kind(r"attn[_.]to_qkv_mlp_proj|(double|single)_stream_modulation", "a FLUX.2 LoRA"),
    Kind(r"(^|[_.])layers[_.]\d+[_.](attention|feed_forward)[_.]", "a Z-Image or Lumina LoRA"),
)  # fmt: skip
# Width of q's input -> a model whose blocks have the names of FLUX.1's.
OTHER_WIDTHS = {1536: "an SD3 LoRA", 2432: "an SD3.5 LoRA", 6144: "a FLUX.2 LoRA"}
KINDS = (
    Kind(r"\.lokr_\w+$", "LoKr, a Kronecker product, which cannot be written as a LoRA of its rank"),
    Kind(r"\.hada_\w+$", "LoHa, a Hadamard product, which cannot be written as a LoRA of its rank"),
    Kind(r"\.(oft_\w+|oft_R\.weight|boft_\w+)$", "OFT, a rotation of the weights, which is no LoRA"),
    Kind(r"\.[ab][12]\.weight$", "GLoRA, which is no LoRA"),
    Kind(r"\.on_input$|\.ia3_\w+", "IA3, which is no LoRA"),
    Kind(r"\.lora_mid\.weight$", "LoCon with a middle matrix, which is for convolutions; FLUX.1 has none"),
    Kind(r"dora_scale$|lora_magnitude_vector", "DoRA, whose magnitudes go with the base's weights: no LoRA can hold them"),
    Kind(
        r"_norm[._](scale|set_weight|weight|diff)$|\.[wb]_norm$|norm_[qk]\.weight$",
        "a norm's weights, which LoRA files of neither layout have", True,
    ),
    Kind(r"\.reshape_weight$", "a control LoRA's wider input, which is for another transformer than FLUX.1's"),
    Kind(r"\.diff_b$|\.bias$|\.lora_bias$", "a bias, which LoRA files of the kohya layout do not have", True),
    Kind(r"\.diff$", "a full difference of a weight, which is no LoRA", True),
    Kind(
        r"^(lora_te[23]_encoder_block_|text_encoder_2\.encoder\.|text_encoders\.t5xxl\.)",
        "a T5 LoRA, which diffusers does not read and fluxrun does not convert", True,
    ),
    Kind(r"^bundle_emb\.", "an embedding bundled with the LoRA; take it out as a file of its own", True),
)  # fmt: skip
UNKNOWN = Kind("", "no layer of FLUX.1")
SHOWN = 3  # keys of each kind that a message names


@dataclass(frozen=True)
class Contents:
    """adapter: of the file's LoRA, without what changes nothing; left_out: the keys of what else it holds, by what that is;
    zeros: keys outside of the adapter that change nothing."""

    adapter: Adapter
    left_out: Mapping[Kind, tuple[str, ...]]
    zeros: tuple[str, ...]

    def told(self) -> str:
        return "; ".join(f"{kind.name} ({some(keys)})" for kind, keys in self.left_out.items())


def read(named: Mapping[str, Tensor], config: Mapping[str, Any]) -> Contents:
    """Any layout's LoRA. `config`: what the file's `lora_adapter_metadata` holds, {} where it has none.

    Raises BadFileError for NaN and infinite values, with their key, for an alpha of 0, and for two adapters of one layer.
    """
    refuse_not_finite(named)
    wide = {key: value.float() if value.element_size() == 1 else value for key, value in named.items()}
    found, odd = gather(wide, ENDS)
    transformer: dict[str, Factors] = {}
    text: dict[str, Factors] = {}
    for stem, factors in found.items():
        if (module := _clip_name(stem)) is not None:
            text[module] = _with_stated(factors, config, TEXT, stem, named)
        elif (modules := _modules(stem)) is not None:
            parts = split(modules, _with_stated(factors, config, TRANSFORMER, stem, named))
            if twice := [one for one in parts if one in transformer]:
                raise BadFileError(f"{stem}: another key is an adapter of {twice[0]} too; one file holds one LoRA")
            transformer |= parts
        else:
            odd.append(stem)
    keys = list(_keys_of(odd, named))
    zeros = [key for key in keys if _changes_nothing(key, named, found)]
    adapter = Adapter(_kept(transformer), _kept(text))
    return Contents(adapter, _sorted_out([key for key in keys if key not in zeros], named, adapter), tuple(zeros))


def refuse_not_finite(named: Mapping[str, Tensor]) -> None:
    """Raises BadFileError with the first keys that hold NaN or infinite values."""
    bad: dict[str, list[str]] = {}
    for key, value in named.items():
        if value.is_floating_point():
            whole = value.float()
            for what, mask in (("NaN", whole.isnan()), ("infinite values", whole.isinf())):
                if mask.any():
                    bad.setdefault(what, []).append(f"{key}, {int(mask.sum())} of {value.numel()}")
    if bad:
        told = "; ".join(f"{what} in {_several(places)}" for what, places in bad.items())
        raise BadFileError(f"{told}; a LoRA with such values draws nothing, so use an earlier step's")


def _refuse_alpha_of_zero(stem: str, factors: Factors) -> None:
    """sd-scripts (networks/lora_flux.py, LoRAModule) takes 0 as the rank; the formula and other programs as no change."""
    if factors.alpha == 0 and factors.up.any():
        raise BadFileError(
            f"{stem}: its alpha is 0, which sd-scripts takes as the rank ({factors.down.shape[0]}) and other programs as no "
            "change at all; write the alpha that is meant into the file, or take the layer out"
        )


def _kept(parts: Mapping[str, Factors]) -> dict[str, Factors]:
    return {name: less for name, part in parts.items() if (less := trim(part)) is not None}


def _with_stated(
    factors: Factors, config: Mapping[str, Any], component: str, stem: str, named: Mapping[str, Tensor]
) -> Factors:
    stated = stated_alpha(config, component, stem.removeprefix("base_model.model.").removeprefix(f"{component}."))
    if stated is not None and f"{stem}.alpha" not in named:
        factors = Factors(factors.down, factors.up, stated)
    _refuse_alpha_of_zero(stem, factors)
    return factors


# ---- names -------------------------------------------------------------------------------------------------------------


def _clip_name(stem: str) -> str | None:
    for prefix in CLIP_PREFIXES:
        found = re.fullmatch(rf"(?:text_model[._])?{CLIP_MODULE.pattern}", stem.removeprefix(prefix))
        if stem.startswith(prefix) and found:
            return clip_module(found)
    return None


def _modules(stem: str) -> tuple[str, ...] | None:
    """The modules of diffusers' transformer that an adapter is of, in the order of its output rows."""
    for prefix in (*PREFIXES, ""):
        if stem.startswith(prefix):
            path = stem.removeprefix(prefix).replace(".", "_")
            if (found := modules_of(path) or _UNDERSCORED.get(path) or _in_block(path)) is not None:
                return found
    return None


def _in_block(path: str) -> tuple[str, ...] | None:
    found = re.fullmatch(r"((?:single_|double_|single_transformer_|transformer_)blocks)_(\d+)_(.+)", path)
    if found is None or (table := _PARTS.get(found[1])) is None or found[3] not in table:
        return None
    block, parts = table[found[3]]
    return tuple(f"{block}.{found[2]}.{part}" for part in parts)


def _underscored(block: str, table: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {part.replace(".", "_"): (block, (part,)) for parts in table.values() for part in parts}


_UNDERSCORED = {module.replace(".", "_"): (module,) for module in AROUND.values()}
_PARTS = {
    "transformer_blocks": _underscored("transformer_blocks", DOUBLE),
    "single_transformer_blocks": _underscored("single_transformer_blocks", SINGLE),
    "double_blocks": {name: ("transformer_blocks", parts) for name, parts in XFLUX_DOUBLE.items()},
    "single_blocks": {name: ("single_transformer_blocks", parts) for name, parts in XFLUX_SINGLE.items()},
}


# ---- what is something else --------------------------------------------------------------------------------------------


def _keys_of(odd: list[str], named: Mapping[str, Tensor]) -> Iterator[str]:
    """Of stems the keys below them."""
    for key in named:
        if any(key == one or key.startswith(f"{one}.") for one in odd):
            yield key


def _changes_nothing(key: str, named: Mapping[str, Tensor], found: Mapping[str, Factors]) -> bool:
    """A bias or a difference of zeros; and any part of a pair whose `up` is zero."""
    pair = next((found[key.removesuffix(f".{end}")] for end in ENDS if key.removesuffix(f".{end}") in found), None)
    if pair is not None:
        return not torch.count_nonzero(pair.up)
    return re.search(r"(\.bias|\.diff_b|\.diff)$", key) is not None and not torch.count_nonzero(named[key])


def _sorted_out(keys: list[str], named: Mapping[str, Tensor], adapter: Adapter) -> dict[Kind, tuple[str, ...]]:
    """Each key under what it is."""
    model = next((kind for kind in OTHER_MODELS if any(re.search(kind.pattern, key) for key in keys)), None)
    out: dict[Kind, list[str]] = {}
    if (other := _same_names_as(adapter)) is not None:
        out[Kind("", other)] = [key for key in named if not key.endswith(".alpha")]
        return {kind: tuple(found) for kind, found in out.items()}
    for key in keys:
        kind = next((kind for kind in KINDS if re.search(kind.pattern, key)), None)
        if kind is None and key.endswith(".alpha"):
            continue  # of a pair, or of a kind that other keys tell
        out.setdefault(kind or _broken_pair(key, named) or model or UNKNOWN, []).append(key)
    return {kind: tuple(found) for kind, found in out.items()}


def _broken_pair(key: str, named: Mapping[str, Tensor]) -> Kind | None:
    """What is wrong with the pair that a key is half of, where it is one of a layer of FLUX.1."""
    end = next((end for end in ENDS if key.endswith(f".{end}")), None)
    if end is None:
        return None
    stem = key.removesuffix(f".{end}")
    if _clip_name(stem) is None and _modules(stem) is None:
        return None
    halves = {ENDS[one]: named[f"{stem}.{one}"] for one in ENDS if f"{stem}.{one}" in named}
    if "down" not in halves or "up" not in halves:
        return Kind("", "half of a pair, whose other half is missing")
    if halves["down"].ndim != 2 or halves["up"].ndim != 2:
        return Kind("", "a pair that is not of two matrices")
    down, up = halves["down"].shape[0], halves["up"].shape[1]
    return Kind("", f"a pair whose ranks do not match, {down} and {up}")


def _same_names_as(adapter: Adapter) -> str | None:
    """Another model whose blocks are called like FLUX.1's, by its width or its number of blocks."""
    for module, factors in adapter.transformer.items():
        block, _, rest = module.partition(".")
        number = rest.partition(".")[0]
        if block in BLOCKS and int(number) >= BLOCKS[block]:
            return f"a LoRA of another model ({block}.{number}; FLUX.1 has {BLOCKS[block]} of these)"
        if block == "transformer_blocks" and rest.endswith("attn.to_q") and factors.down.shape[1] in OTHER_WIDTHS:
            return OTHER_WIDTHS[factors.down.shape[1]]
    return None


def some(keys: tuple[str, ...]) -> str:
    return f"{len(keys)} key{'' if len(keys) == 1 else 's'}: {_several(list(keys))}"


def _several(told: list[str]) -> str:
    more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    return ", ".join(told[:SHOWN]) + more
