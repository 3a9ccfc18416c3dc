"""Running the Python of a page, and comparing its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), names)
    return names


def difference(one: Path, other: Path) -> int:
    """The largest of any pixel, of 255."""
    with Image.open(one) as a, Image.open(other) as b:
        assert a.size == b.size
        return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())
