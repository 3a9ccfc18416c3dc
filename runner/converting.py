"""`fluxrun convert`: a LoRA file from elsewhere in the other layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runner import export, files, tensors, verify
from runner.errors import BadFile, FluxrunError
from runner.layouts import Adapter, Factors, from_diffusers, from_kohya, is_kohya, split_kohya, to_diffusers, to_kohya


def convert(file: Path, to: str, out: Path | None) -> tuple[Path, float]:
    """Write `file` in the layout `to` ("diffusers" or "kohya"), by default beside it. Returns the new file and the largest
    difference of any weight's change. Raises BadFile with the keys that are no LoRA of FLUX.1."""
    out = out or file.with_suffix(f".{to}.safetensors")
    if out.exists() and out.samefile(file):
        raise FluxrunError(f"--out {out}: that is the file itself; name another")
    named, header = _read(file)
    config: dict[str, Any] = json.loads(header.get("lora_adapter_metadata", "{}"))
    try:
        adapter = from_kohya(named) if is_kohya(named) else from_diffusers(named, config)
    except BadFile as error:
        raise BadFile(f"{file}: {error}") from error
    if not adapter.transformer and not adapter.text:
        raise BadFile(f"{file}: no LoRA in it that changes anything; wanted is a LoRA of FLUX.1")
    files.make_folder(out.parent)
    if to == "kohya":
        made = to_kohya(adapter)
        tensors.save(out, made, {**_kept(header), **_network(adapter), **export.hashes(made)})
        stored = split_kohya(tensors.load(out)[0])
    else:
        tensors.save(out, to_diffusers(adapter), {"format": "pt", **_kept(header)})
        stored = from_diffusers(tensors.load(out)[0], {})
    return out, verify.compare(out.name, adapter, stored, torch.float32)


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Any safetensors file; those of others carry no digest."""
    try:
        with safe_open(file, framework="pt") as opened:
            named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not iterable itself
            return named, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise BadFile(
            f"{file}: not a safetensors file ({error}); other formats may hold code and are not read"
        ) from error


def _kept(header: dict[str, str]) -> dict[str, str]:
    """What says whose work it is; hashes are of the tensors and would be wrong."""
    return {key: value for key, value in header.items() if key.startswith("modelspec.") and "hash" not in key}


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
