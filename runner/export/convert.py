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
    """file: the new one; error: the largest difference of any weight's change; notes: what of the old one is not in it."""

    file: Path
    error: float
    notes: tuple[str, ...]


def convert(file: Path, to: str, out: Path | None, *, leave_out: bool = False) -> Converted:
    """Write `file` in the layout `to` ("diffusers" or "kohya"), by default beside it; the new file gets its name once it
    was read back. Raises FluxrunError where `out` exists or is named as another kind of file, and BadFileError with what `file`
    holds that is no LoRA of FLUX.1; with `leave_out` only where the rest would not be a whole LoRA without it."""
    out = out or file.with_suffix(f".{to}.safetensors")
    _refuse_output(out, file)
    named, header = _read(file)
    try:
        found = foreign_layouts.read(named, _config(header))
    except BadFileError as error:
        raise BadFileError(f"{file}: {error}") from error
    _refuse(file, found, leave_out)
    files.output_folder(out)
    aside = files.partial_path(out)
    try:
        largest = _write(aside, out.name, found.adapter, to, header)
        files.DISK.rename(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    files.DISK.sync_folder(out.parent)
    notes = [f"left out: {found.told()}"] if found.left_out else []
    if found.zeros:
        notes.append(f"left out: zeros, which change nothing ({foreign_layouts.some(found.zeros)})")
    return Converted(out, largest, tuple(notes))


def _refuse_output(out: Path, file: Path) -> None:
    if out.exists() and out.samefile(file):
        raise FluxrunError(f"--out {out}: that is the file itself; name another")
    if out.suffix != ".safetensors":
        raise FluxrunError(f"--out {out}: the new file is a safetensors file; name one that ends in .safetensors")
    if os.path.lexists(out):
        raise FluxrunError(f"{out} exists; name another with --out, or move it away")


def _refuse(file: Path, found: Contents, leave_out: bool) -> None:
    if any(not kind.beside for kind in found.left_out):
        raise BadFileError(f"{file}: {found.told()}; wanted is a LoRA of FLUX.1")
    if not found.adapter.transformer and not found.adapter.text:
        told = f"{found.told()}; there is" if found.left_out else "there is"
        raise BadFileError(f"{file}: {told} no LoRA in it that changes FLUX.1's transformer or CLIP; wanted is one")
    if found.left_out and not leave_out:
        raise BadFileError(f"{file}: {found.told()}; nothing was written: --leave-out converts the rest without it")


def _write(path: Path, name: str, adapter: Adapter, to: str, header: dict[str, str]) -> float:
    if to == "kohya":
        made = to_kohya(adapter)
        tensors.save(path, made, {**_kept(header), **_network(adapter), **webui.hashes(made)})
        stored = split_kohya(tensors.load(path)[0])
    else:
        described = json.dumps(_described(adapter), sort_keys=True)
        tensors.save(path, to_diffusers(adapter), {"format": "pt", "lora_adapter_metadata": described, **_kept(header)})
        named, written = tensors.load(path)
        stored = from_diffusers(named, json.loads(written["lora_adapter_metadata"]))
    return verify.compare(name, adapter, stored, torch.float32)


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Any safetensors file; those of others carry no digest."""
    try:
        with safe_open(file, framework="pt") as opened:
            named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not iterable itself
            return named, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise BadFileError(
            f"{file}: not a safetensors file ({error}); other formats may hold code and are not read"
        ) from error


def _config(header: dict[str, str]) -> dict[str, Any]:
    """{} where there is none, or it is no JSON object."""
    try:
        found = json.loads(header.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _kept(header: dict[str, str]) -> dict[str, str]:
    """What says whose work it is; hashes are of the tensors and would be wrong."""
    return {key: value for key, value in header.items() if key.startswith("modelspec.") and "hash" not in key}


def _described(adapter: Adapter) -> dict[str, Any]:
    """peft's configs with alpha = rank for every layer. Layers of another rank than most have theirs in peft's patterns:
    without them older diffusers take one alpha for all ranks. A pattern matches the end of a name (`proj_out` is also the
    end of a block's), so the transformer's begin with ^; CLIP's may have `text_model.` before them."""
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
    """sd-scripts' least, from the first layer."""
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
