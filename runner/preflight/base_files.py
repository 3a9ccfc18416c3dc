"""Whether a base model's files are all there and whole, by their names and headers, without reading their gigabytes. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.base.layers import linear_layers
from runner.core.humanize import list_some
from runner.preflight.tokenizers import FOLDERS, CaptionReader

WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "vae": "diffusion_pytorch_model",
}
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
Tensors = Mapping[str, tuple[int, ...]]


class BadPartError(Exception):
    """What is wrong with one of a base's files."""


def check_base(folder: Path, variant: str | None) -> tuple[list[str], dict[str, int]]:
    """(what is wrong, how many numbers each part that could be read holds)."""
    told = [*_index(folder), *_scheduler(folder)]
    numbers: dict[str, int] = {}
    for part in WEIGHTS:
        try:
            tensors = _tensors(folder / part, part, variant)
            numbers[part] = sum(math.prod(shape) for shape in tensors.values())
            if part == "transformer":
                _layers_agree(folder / part, tensors)
        except BadPartError as error:
            told.append(str(error))
    for encoder, name in FOLDERS.items():
        if (folder / name / "spiece.model").is_file() and not (folder / name / "tokenizer.json").is_file():
            continue  # read by sentencepiece, which the check does not try
        try:
            CaptionReader(folder, encoder)
        except (OSError, ValueError, KeyError) as error:
            told.append(f"{folder / name}: its tokenizer cannot be read ({error}); fetch it again")
    return told, numbers


def _index(folder: Path) -> Iterator[str]:
    path = folder / "model_index.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found.get("_class_name") if isinstance(found, dict) else None
    except (OSError, ValueError) as error:
        yield f"{path} cannot be read ({error}); fetch it again"
        return
    if not str(kind).startswith("Flux"):
        yield f"{path} is of another kind of model (found {kind!r}); name a FluxPipeline"


def _scheduler(folder: Path) -> Iterator[str]:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"{path} cannot be read ({error}); fetch it again"


def _tensors(folder: Path, part: str, variant: str | None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a part. Raises BadPartError."""
    if not (folder / "config.json").is_file():
        raise BadPartError(f"{folder} holds no config.json; the base's {part} is missing, fetch it again")
    stem, mark = WEIGHTS[part], f".{variant}" if variant else ""
    whole = folder / f"{stem}{mark}.safetensors"
    index = folder / f"{stem}.safetensors.index{mark}.json"
    if index.is_file() and not whole.is_file():
        return _shards(index)
    if whole.is_file():
        return read_header(whole)
    other = sorted(path.name for path in folder.glob("*.safetensors*"))
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if other:
        hint = "set or take out model.variant" if variant else "set model.variant where their names have one"
        raise BadPartError(f"{folder} holds no {whole.name} (found {list_some(other)}); {hint}, or fetch it again")
    if pickled:
        raise BadPartError(
            f"{folder} holds only pickled weights (found {list_some(pickled)}), which can run code when they are read; "
            "save the model as safetensors"
        )
    raise BadPartError(f"{folder} holds no weights; it must have {whole.name}, or {index.name} and its shards")


def _shards(index: Path) -> dict[str, tuple[int, ...]]:
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(names.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadPartError(
            f"{index} is not an index of shards ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if outside := [name for name in shards if Path(name).name != name]:
        raise BadPartError(f"{index} names files outside its folder ({list_some(outside)}); fetch it again")
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise BadPartError(
            f"{index} names {len(shards)} shards, of which {len(missing)} are missing ({list_some(missing)}); fetch them again"
        )
    tensors = {shard: read_header(index.parent / shard) for shard in shards}
    if lost := [name for name, shard in names.items() if name not in tensors[shard]]:
        raise BadPartError(f"{index} names tensors that their shards do not hold ({list_some(lost)}); fetch it again")
    return {name: shape for each in tensors.values() for name, shape in each.items()}


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of a safetensors file's tensors. Raises BadPartError where header and size do not agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 2 <= length <= min(size - 8, LONGEST_HEADER) else b""
    try:
        found: dict[str, Any] = json.loads(text)
        found.pop("__metadata__", None)
        tensors = {str(name): tuple(int(side) for side in one["shape"]) for name, one in found.items()}
        end = 8 + length + max((int(one["data_offsets"][1]) for one in found.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        start = "a Git LFS pointer" if text == b"" and _is_pointer(path) else "no safetensors header"
        raise BadPartError(f"{path} is not whole ({start}, {size:,} bytes); fetch it again") from error
    if end != size:
        raise BadPartError(f"{path} is not whole (found {size:,} bytes, its header says {end:,}); fetch it again")
    return tensors


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _layers_agree(folder: Path, tensors: Tensors) -> None:
    """The LoRA is shaped by config.json, so the weights must be of that shape."""
    try:
        wanted = linear_layers(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadPartError(
            f"{folder / 'config.json'} is not a FLUX transformer's ({error!r}); fetch it again"
        ) from error
    for name, shape in wanted.items():
        found = tensors.get(f"{name}.weight")
        if found != shape:
            raise BadPartError(
                f"{folder}: {name}.weight is {'missing' if found is None else list(found)}, its config.json says "
                f"{list(shape)}; they are not of one model, fetch it again"
            )
