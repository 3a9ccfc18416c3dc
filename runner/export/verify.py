"""Reads exported files back and compares them with the trained weights.

The functions on files return the largest absolute error of any weight, rounding to the file's dtype included. All
functions raise BadFileError, with the layer, if a difference is larger than rounding explains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.checkpoint.storage import Weights
from runner.core.errors import BadFileError
from runner.export.formats import EMBEDDING_KEYS
from runner.export.lora_layouts import Adapter, Factors, difference, from_diffusers, split_kohya, trim
from runner.model import tensors
from runner.model.family import LayerNames
from runner.model.lora import LoraShape

TOLERANCE = 1e-5  # relative to the largest value that an adapter adds; allows for another order of sums in fp32


def lora_file(path: Path, trained: Adapter, dtype: torch.dtype, names: LayerNames) -> float:
    """Check a file of diffusers' layout. Some programs read alpha from its metadata, others take every scale for 1;
    alpha must equal the rank, so that both get the trained weights."""
    named, header = tensors.load(path)
    stored = from_diffusers(named, json.loads(header["lora_adapter_metadata"]), names)
    for name, factors in (*stored.transformer.items(), *stored.text.items()):
        if factors.scale != 1:
            raise BadFileError(
                f"{path.name}: {name} has alpha {factors.alpha:g} where its rank is {factors.down.shape[0]}"
            )
    return compare(path.name, trained, stored, dtype, folded=True)


def kohya_file(path: Path, trained: Adapter, dtype: torch.dtype, names: LayerNames) -> float:
    """Check a file of the original layout, by the rows of each fused matrix."""
    named, _ = tensors.load(path)
    return compare(path.name, trained, split_kohya(named, names), dtype)


def compare(file: str, trained: Adapter, stored: Adapter, dtype: torch.dtype, *, folded: bool = False) -> float:
    """The largest absolute error of what `stored` adds to any weight, compared with `trained`, which is in fp32.

    `stored` must equal `trained` after its factors were rounded to `dtype`; with `folded`, after the scale was
    multiplied into `up` before that. Modules that are stored but were not trained must add nothing. Raises
    BadFileError. file: for its messages.
    """
    largest = 0.0
    pairs = ((trained.transformer, stored.transformer), (trained.text, stored.text))
    for trained_parts, stored_parts in pairs:
        for name in [*trained_parts, *(name for name in stored_parts if name not in trained_parts)]:
            if name not in stored_parts:
                raise BadFileError(f"{file}: {name} was trained and is not in it")
            error = _error(stored_parts[name], trained_parts.get(name), dtype, folded)
            if error is None or not math.isfinite(error):
                raise BadFileError(f"{file}: {name} changes its layer otherwise than was trained")
            largest = max(largest, error)
    return largest


def _error(stored: Factors, trained: Factors | None, dtype: torch.dtype, folded: bool) -> float | None:
    """The largest absolute difference from the trained adapter. None if `stored` is not the trained adapter,
    rounded."""
    actual = trim(stored)
    expected = trim(_rounded(trained, dtype, folded)) if trained else None
    if actual is None or expected is None:
        if (actual is None) != (expected is None):
            return None
        return difference(trained, None) if trained else 0.0
    equal = _equal(actual, expected)
    if not equal and not difference(actual, expected) <= TOLERANCE * difference(expected, None):
        return None
    exact = trained is not None and dtype == torch.float32 and actual.scale == trained.scale
    return 0.0 if exact and equal else difference(actual, trained)  # difference() itself rounds, so not where it is 0


def _rounded(trained: Factors, dtype: torch.dtype, folded: bool) -> Factors:
    down = trained.down.to(dtype)
    if not folded:
        return Factors(down, trained.up.to(dtype), trained.alpha)
    return Factors(down, (trained.up.float() * trained.scale).to(dtype), float(down.shape[0]))


def _equal(first: Factors, second: Factors) -> bool:
    return (
        math.isclose(first.scale, second.scale, rel_tol=1e-6)
        and torch.equal(first.down.float(), second.down.float())
        and torch.equal(first.up.float(), second.up.float())
    )


def embeddings(path: Path, weights: Weights, dtype: torch.dtype) -> float:
    """Check a file of token embeddings, by value."""
    named, _ = tensors.load(path)
    encoder_of = {key: encoder for encoder, keys in EMBEDDING_KEYS.items() for key in keys}
    largest = 0.0
    for key, rows in named.items():
        trained = weights.rows[encoder_of[key]].cpu()
        if not torch.equal(rows, trained.to(dtype)):
            raise BadFileError(f"{path.name}: {key} holds other rows than were learned")
        error = float((rows.float() - trained).abs().max())
        if not math.isfinite(error):
            raise BadFileError(f"{path.name}: {key} has values that {dtype} cannot hold; use another export.dtype")
        largest = max(largest, error)
    return largest


def loaded_lora(model: Any, stored: Mapping[str, Tensor], shape: LoraShape) -> None:
    """Check the adapter that stock diffusers loaded into `model`. stored: by peft's names, as written to the file."""
    adapters = list(getattr(model, "peft_config", {}))
    if len(adapters) != 1:
        raise BadFileError(f"diffusers loaded {len(adapters)} adapters instead of one")
    loaded = {
        name.replace(f".{adapters[0]}.weight", ".weight"): value
        for name, value in model.named_parameters()
        if f".{adapters[0]}." in name
    }
    if loaded.keys() != stored.keys():
        name = sorted(loaded.keys() ^ stored.keys())[0]
        raise BadFileError(f"{name} is trained or loaded by diffusers, not both")
    for name, value in stored.items():
        if not torch.equal(loaded[name].cpu(), value.cpu().to(loaded[name].dtype)):
            raise BadFileError(f"{name} reads back in diffusers with other values than were trained")
    scale = shape.alpha / shape.rank
    for name, module in model.named_modules():
        if adapters[0] in getattr(module, "scaling", {}) and module.scaling[adapters[0]] != scale:
            raise BadFileError(f"{name} reads back with scale {module.scaling[adapters[0]]}, trained was {scale}")


def loaded_embeddings(encoders: Mapping[str, tuple[Any, Any]], stored: Weights, pieces: list[str]) -> None:
    """Check the token embeddings that stock diffusers loaded. encoders: (model, tokenizer) by name."""
    for encoder, rows in stored.rows.items():
        model, tokenizer = encoders[encoder]
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(pieces), device=model.device)
        loaded = model.get_input_embeddings().weight[ids].cpu()
        if not torch.equal(loaded, rows.cpu().to(loaded.dtype)):
            raise BadFileError(f"{encoder} embeddings read back in diffusers with other values than were trained")
