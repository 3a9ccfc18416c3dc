"""What was written must be what was trained. Every function gives the largest error, or raises BadFileError with the layer."""

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

TOLERANCE = 1e-5  # of a matrix's largest change: what another order of fp32 sums may cost, and no more


def lora_file(path: Path, trained: Adapter, dtype: torch.dtype, names: LayerNames) -> float:
    """diffusers' layout. It must give the trained change to readers of its metadata and to those that take every scale
    for 1, so alpha must be the rank."""
    named, header = tensors.load(path)
    stored = from_diffusers(named, json.loads(header["lora_adapter_metadata"]), names)
    for name, factors in (*stored.transformer.items(), *stored.text.items()):
        if factors.scale != 1:
            raise BadFileError(
                f"{path.name}: {name} has alpha {factors.alpha:g} where its rank is {factors.down.shape[0]}"
            )
    return compare(path.name, trained, stored, dtype, folded=True)


def kohya_file(path: Path, trained: Adapter, dtype: torch.dtype, names: LayerNames) -> float:
    """The original layout, by the rows of each fused matrix."""
    named, _ = tensors.load(path)
    return compare(path.name, trained, split_kohya(named, names), dtype)


def compare(file: str, trained: Adapter, stored: Adapter, dtype: torch.dtype, *, folded: bool = False) -> float:
    """`trained` in fp32; `stored` must be its change once its factors are rounded to `dtype`, where `folded` after the
    scale was multiplied into `up`. The error is that of the change of a weight, rounding included. What is stored and was
    not trained must change nothing."""
    largest = 0.0
    for ours, theirs in ((trained.transformer, stored.transformer), (trained.text, stored.text)):
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            if name not in theirs:
                raise BadFileError(f"{file}: {name} was trained and is not in it")
            error = _error(theirs[name], ours.get(name), dtype, folded)
            if error is None or not math.isfinite(error):
                raise BadFileError(f"{file}: {name} changes its layer otherwise than was trained")
            largest = max(largest, error)
    return largest


def _error(stored: Factors, trained: Factors | None, dtype: torch.dtype, folded: bool) -> float | None:
    """How far the change is from the trained one; None where it is not even that of the rounded factors."""
    found = trim(stored)
    wanted = trim(_rounded(trained, dtype, folded)) if trained else None
    if found is None or wanted is None:
        if (found is None) != (wanted is None):
            return None
        return difference(trained, None) if trained else 0.0
    if not _same(found, wanted) and not difference(found, wanted) <= TOLERANCE * difference(wanted, None):
        return None
    exact = trained is not None and dtype == torch.float32 and found.scale == trained.scale
    return 0.0 if exact and _same(found, wanted) else difference(found, trained)  # sums would only add their own error


def _rounded(trained: Factors, dtype: torch.dtype, folded: bool) -> Factors:
    down = trained.down.to(dtype)
    if not folded:
        return Factors(down, trained.up.to(dtype), trained.alpha)
    return Factors(down, (trained.up.float() * trained.scale).to(dtype), float(down.shape[0]))


def _same(one: Factors, other: Factors) -> bool:
    return (
        math.isclose(one.scale, other.scale, rel_tol=1e-6)
        and torch.equal(one.down.float(), other.down.float())
        and torch.equal(one.up.float(), other.up.float())
    )


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def embeddings(path: Path, weights: Weights, dtype: torch.dtype) -> float:
    """Each key's rows by value."""
    named, _ = tensors.load(path)
    owners = {key: encoder for encoder, keys in EMBEDDING_KEYS.items() for key in keys}
    largest = 0.0
    for key, rows in named.items():
        trained = weights.rows[owners[key]].cpu()
        if not torch.equal(rows, trained.to(dtype)):
            raise BadFileError(f"{path.name}: {key} holds other rows than were learned")
        error = _largest(rows.float() - trained)
        if not math.isfinite(error):
            raise BadFileError(f"{path.name}: {key} has values that {dtype} cannot hold; use another export.dtype")
        largest = max(largest, error)
    return largest


def loaded_lora(model: Any, stored: Mapping[str, Tensor], shape: LoraShape) -> None:
    """The adapter that stock diffusers made of a file must be the stored one. Raises BadFileError with the layer."""
    adapters = list(getattr(model, "peft_config", {}))
    if len(adapters) != 1:
        raise BadFileError(f"diffusers loaded {len(adapters)} adapters instead of one")
    loaded = {
        name.replace(f".{adapters[0]}.weight", ".weight"): value
        for name, value in model.named_parameters()
        if f".{adapters[0]}." in name
    }
    if loaded.keys() != stored.keys():
        odd = sorted(loaded.keys() ^ stored.keys())[0]
        raise BadFileError(f"{odd} is trained or loaded by diffusers, not both")
    for name, value in stored.items():
        if not torch.equal(loaded[name].cpu(), value.cpu().to(loaded[name].dtype)):
            raise BadFileError(f"{name} reads back in diffusers with other values than were trained")
    scale = shape.alpha / shape.rank
    for name, module in model.named_modules():
        if adapters[0] in getattr(module, "scaling", {}) and module.scaling[adapters[0]] != scale:
            raise BadFileError(f"{name} reads back with scale {module.scaling[adapters[0]]}, trained was {scale}")


def loaded_embeddings(encoders: Mapping[str, tuple[Any, Any]], stored: Weights, pieces: list[str]) -> None:
    """The rows that stock diffusers put into its encoders must be the stored ones. encoders: (model, tokenizer) by name."""
    for encoder, rows in stored.rows.items():
        model, tokenizer = encoders[encoder]
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(pieces), device=model.device)
        loaded = model.get_input_embeddings().weight[ids].cpu()
        if not torch.equal(loaded, rows.cpu().to(loaded.dtype)):
            raise BadFileError(f"{encoder} embeddings read back in diffusers with other values than were trained")
