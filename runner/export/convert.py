"""`fluxrun convert`: a LoRA file from elsewhere in diffusers' layout or the original one."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runner.core import files
from runner.core.errors import BadFileError, FluxrunError
from runner.export import foreign_layouts, verify, webui
from runner.export.foreign_layouts import Contents
from runner.export.lora_layouts import (
    TEXT,
    TRANSFORMER,
    Adapter,
    Factors,
    from_diffusers,
    split_kohya,
    to_diffusers,
    to_kohya,
)
from runner.model import tensors


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    file: the new file. error: the largest absolute difference, over all weights, between what the two files add to a
    weight. notes: what the old file holds and the new one does not.
    """

    file: Path
    error: float
    notes: tuple[str, ...]


def convert(file: Path, to: str, out: Path | None, *, leave_out: bool = False) -> Converted:
    """Write the LoRA in `file` in another layout, and read it back before the new file gets its name.

    to: "diffusers" or "kohya". out: the new file, by default `file` with another suffix. leave_out: convert the LoRA
    even if the file also holds something else. Raises FluxrunError if `out` exists or is no .safetensors; BadFileError
    if `file` holds no LoRA of FLUX.1, or something else without which it is incomplete.
    """
    out = out or file.with_suffix(f".{to}.safetensors")
    _refuse_output(out, file)
    named, header = _read(file)
    try:
        contents = foreign_layouts.read(named, _config(header))
    except BadFileError as error:
        raise BadFileError(f"{file}: {error}") from error
    _refuse(file, contents, leave_out)
    files.output_folder(out)
    staging = files.partial_path(out)
    try:
        largest = _write(staging, out.name, contents.adapter, to, header)
        files.DISK.rename(staging, out)
    finally:
        staging.unlink(missing_ok=True)
    files.DISK.sync_folder(out.parent)
    notes = [f"left out: {contents.describe_left_out()}"] if contents.left_out else []
    if contents.zeros:
        notes.append(f"left out: zeros, which change nothing ({foreign_layouts.count_and_list(contents.zeros)})")
    return Converted(out, largest, tuple(notes))


def _refuse_output(out: Path, file: Path) -> None:
    if out.exists() and out.samefile(file):
        raise FluxrunError(f"--out {out}: that is the file itself; name another")
    if out.suffix != ".safetensors":
        raise FluxrunError(f"--out {out}: the new file is a safetensors file; name one that ends in .safetensors")
    if os.path.lexists(out):
        raise FluxrunError(f"{out} exists; name another with --out, or move it away")


def _refuse(file: Path, contents: Contents, leave_out: bool) -> None:
    if any(not kind.optional for kind in contents.left_out):
        raise BadFileError(f"{file}: {contents.describe_left_out()}; wanted is a LoRA of FLUX.1")
    if not contents.adapter.transformer and not contents.adapter.text:
        start = f"{contents.describe_left_out()}; there is" if contents.left_out else "there is"
        raise BadFileError(f"{file}: {start} no LoRA in it that changes FLUX.1's transformer or CLIP; wanted is one")
    if contents.left_out and not leave_out:
        raise BadFileError(
            f"{file}: {contents.describe_left_out()}; nothing was written: --leave-out converts the rest without it"
        )


def _write(path: Path, name: str, adapter: Adapter, to: str, header: dict[str, str]) -> float:
    if to == "kohya":
        converted = to_kohya(adapter)
        tensors.save(path, converted, {**_kept(header), **_network(adapter), **webui.hashes(converted)})
        stored = split_kohya(tensors.load(path)[0])
    else:
        described = json.dumps(_described(adapter), sort_keys=True)
        tensors.save(path, to_diffusers(adapter), {"format": "pt", "lora_adapter_metadata": described, **_kept(header)})
        named, written = tensors.load(path)
        stored = from_diffusers(named, json.loads(written["lora_adapter_metadata"]))
    return verify.compare(name, adapter, stored, torch.float32)


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of any safetensors file. Files of other programs carry no digest, so none is checked."""
    try:
        with safe_open(file, framework="pt") as opened:
            named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not iterable itself
            return named, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise BadFileError(
            f"{file}: not a safetensors file ({error}); other formats may hold code and are not read"
        ) from error


def _config(header: dict[str, str]) -> dict[str, Any]:
    """The adapter's config in the metadata; {} if there is none, or it is no JSON object."""
    try:
        config = json.loads(header.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _kept(header: dict[str, str]) -> dict[str, str]:
    """The metadata about the author and the work. Hashes of the tensors would be wrong for the new file."""
    return {key: value for key, value in header.items() if key.startswith("modelspec.") and "hash" not in key}


def _described(adapter: Adapter) -> dict[str, Any]:
    """peft's configs, with alpha = rank for every layer.

    Layers whose rank is not the most common one are listed in peft's patterns, because older versions of diffusers
    otherwise take one alpha for all ranks. A pattern matches the end of a name, and `proj_out` is also the end of a
    block's layer, so the transformer's patterns begin with ^. CLIP's do not, because `text_model.` may come before
    them.
    """
    out: dict[str, Any] = {}
    for prefix, parts, start in ((TRANSFORMER, adapter.transformer, "^"), (TEXT, adapter.text, "")):
        if not parts:
            continue
        ranks = {name: part.down.shape[0] for name, part in parts.items()}
        [(most, _)] = Counter(ranks.values()).most_common(1)
        others = {f"{start}{name}": rank for name, rank in sorted(ranks.items()) if rank != most}
        config = {"peft_type": "LORA", "r": most, "lora_alpha": float(most), "target_modules": sorted(parts)}
        config |= {"rank_pattern": others, "alpha_pattern": others}
        out |= {f"{prefix}.{key}": value for key, value in config.items()}
    return out


def _network(adapter: Adapter) -> dict[str, str]:
    """The metadata that sd-scripts needs at least; rank and alpha are those of the first layer."""
    parts: list[Factors] = [*adapter.transformer.values(), *adapter.text.values()]
    return {
        "format": "pt",
        "ss_base_model_version": "flux1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(parts[0].down.shape[0]),
        "ss_network_alpha": str(parts[0].alpha),
        "ss_network_args": "{}",
    }
