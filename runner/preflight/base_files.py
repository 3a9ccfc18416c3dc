"""Whether a base model's files are complete, by their names, sizes and headers: their gigabytes are not read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.base.layers import linear_layers
from runner.core.humanize import list_some
from runner.core.safetensors import MAX_HEADER
from runner.preflight.tokenizers import FOLDERS, CaptionReader

WEIGHT_FILES = {  # of each part, without variant and suffix
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "vae": "diffusion_pytorch_model",
}
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
Shapes = dict[str, tuple[int, ...]]  # by the tensor's name


class BadPartError(Exception):
    """A message about what is wrong with one part of a base."""


def check_base_files(folder: Path, variant: str | None) -> tuple[list[str], dict[str, int]]:
    """(messages about what is wrong, number of parameters of each part that could be read)."""
    messages = [*_check_index(folder), *_check_scheduler(folder)]
    parameters: dict[str, int] = {}
    for part in WEIGHT_FILES:
        try:
            shapes = _read_shapes(folder / part, part, variant)
            parameters[part] = sum(math.prod(shape) for shape in shapes.values())
            if part == "transformer":
                _check_layers(folder / part, shapes)
        except BadPartError as error:
            messages.append(str(error))
    for encoder, name in FOLDERS.items():
        if (folder / name / "spiece.model").is_file() and not (folder / name / "tokenizer.json").is_file():
            continue  # T5's sentencepiece model, which the check does not read
        try:
            CaptionReader(folder, encoder)
        except (OSError, ValueError, KeyError) as error:
            messages.append(f"{folder / name}: its tokenizer cannot be read ({error}); fetch it again")
    return messages, parameters


def _check_index(folder: Path) -> Iterator[str]:
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        kind = index.get("_class_name") if isinstance(index, dict) else None
    except (OSError, ValueError) as error:
        yield f"{path} cannot be read ({error}); fetch it again"
        return
    if not str(kind).startswith("Flux"):
        yield f"{path} is of another kind of model (found {kind!r}); name a FluxPipeline"


def _check_scheduler(folder: Path) -> Iterator[str]:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"{path} cannot be read ({error}); fetch it again"


def _read_shapes(folder: Path, part: str, variant: str | None) -> Shapes:
    """The shapes of a part's tensors, from its file or its shards. Raises BadPartError."""
    if not (folder / "config.json").is_file():
        raise BadPartError(f"{folder} holds no config.json; the base's {part} is missing, fetch it again")
    stem, dot_variant = WEIGHT_FILES[part], f".{variant}" if variant else ""
    single = folder / f"{stem}{dot_variant}.safetensors"
    index = folder / f"{stem}.safetensors.index{dot_variant}.json"
    if index.is_file() and not single.is_file():
        return _read_shards(index)
    if single.is_file():
        return read_header(single)
    others = sorted(path.name for path in folder.glob("*.safetensors*"))
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if others:
        hint = "set or take out model.variant" if variant else "set model.variant where their names have one"
        raise BadPartError(f"{folder} holds no {single.name} (found {list_some(others)}); {hint}, or fetch it again")
    if pickled:
        raise BadPartError(
            f"{folder} holds only pickled weights (found {list_some(pickled)}), which can run code when they are read; "
            "save the model as safetensors"
        )
    raise BadPartError(f"{folder} holds no weights; it must have {single.name}, or {index.name} and its shards")


def _read_shards(index: Path) -> Shapes:
    """The shapes in all shards that an index names. Raises BadPartError."""
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
    shapes = {shard: read_header(index.parent / shard) for shard in shards}
    if absent := [name for name, shard in names.items() if name not in shapes[shard]]:
        raise BadPartError(f"{index} names tensors that their shards do not hold ({list_some(absent)}); fetch it again")
    return {name: shape for in_shard in shapes.values() for name, shape in in_shard.items()}


def read_header(path: Path) -> Shapes:
    """The shapes of a safetensors file's tensors. Raises BadPartError where header and size do not agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 2 <= length <= min(size - 8, MAX_HEADER) else b""
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        shapes = {str(name): tuple(int(side) for side in entry["shape"]) for name, entry in header.items()}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        content = "a Git LFS pointer" if text == b"" and _is_lfs_pointer(path) else "no safetensors header"
        raise BadPartError(f"{path} is not whole ({content}, {size:,} bytes); fetch it again") from error
    if end != size:
        raise BadPartError(f"{path} is not whole (found {size:,} bytes, its header says {end:,}); fetch it again")
    return shapes


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _check_layers(folder: Path, shapes: Shapes) -> None:
    """The weights must have the shapes of config.json, which gives the LoRA's. Raises BadPartError."""
    try:
        expected = linear_layers(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadPartError(
            f"{folder / 'config.json'} is not a FLUX transformer's ({error!r}); fetch it again"
        ) from error
    for name, shape in expected.items():
        found = shapes.get(f"{name}.weight")
        if found != shape:
            raise BadPartError(
                f"{folder}: {name}.weight is {'missing' if found is None else list(found)}, its config.json says "
                f"{list(shape)}; they are not of one model, fetch it again"
            )
