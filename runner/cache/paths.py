"""Where the files of the cache are. Needs no torch, so that a plan can look for entries."""

from __future__ import annotations

from pathlib import Path


def cache_folder(runs: Path) -> Path:
    """The cache that all runs of a runs folder share."""
    return runs / "cache"


def entry_file(folder: Path, kind: str, key: str) -> Path:
    """folder: `cache_folder`. kind: "latents", or the name of a text encoder."""
    return folder / kind / key[:2] / f"{key}.safetensors"


def manifest_file(folder: Path, key: str) -> Path:
    """The list of a data set's latents, by its `views_key`."""
    return folder / "views" / key[:2] / f"{key}.json"


def quantized_folder(folder: Path) -> Path:
    """The quantized weights of base models."""
    return folder / "quantized"
