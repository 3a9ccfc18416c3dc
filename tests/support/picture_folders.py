"""Folders of pictures with captions, read as training reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from runner.data import sources
from runner.data.images import Pictures
from runner.data.sources import DatasetSource


def folder(tmp_path: Path) -> Path:
    for index, size in enumerate([(80, 64), (64, 100), (64, 64)]):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (*size, 3), np.uint8)).save(
            tmp_path / f"{index}.png"
        )
    return tmp_path


def read(text: Path, **more: str | None) -> Pictures:
    facts: dict[str, str | None] = {
        "config": None, "split": "train", "image_column": "image", "caption_column": None, "prompt": None, **more,
    }  # fmt: skip
    return sources.read_source(DatasetSource(str(text), **facts))  # type: ignore[arg-type]


def pairs(found: Pictures) -> list[tuple[str, str]]:
    return [(picture.name, picture.caption) for picture in found.items]
