"""Safetensors files: read by everyone, and written to the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from runner.model import tensors


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3, 5).bfloat16(),
        "full": torch.randn(2, 3, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }


def test_our_safetensors_are_everyones_and_repeatable(tmp_path: Path) -> None:
    made = some_tensors()
    for name in ("a", "b"):
        tensors.save(tmp_path / name, made, {"z": "1", "a": "2", "m": "3"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    stock = load_file(tmp_path / "a")
    assert stock.keys() == made.keys()
    assert all(torch.equal(stock[name], made[name]) and stock[name].dtype == made[name].dtype for name in made)
    with safe_open(tmp_path / "a", framework="pt") as opened:
        assert {"z": "1", "a": "2", "m": "3"}.items() <= opened.metadata().items()
