"""The checkpoint file: its name, its check and its size."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint, Weights
from runner.core.errors import BadFileError
from runner.model import tensors, token_rows
from runner.runs import checkpoint_files
from runner.training import optimizers


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / checkpoint_files.checkpoint_name(7)
    storage.write(
        path, Checkpoint("joint", "key", 7, Weights({"a": torch.randn(8, 8)}), {"a/exp_avg": torch.randn(8)}, {"n": 1})
    )
    whole = path.read_bytes()
    assert storage.read(path).step == 7
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(BadFileError):
            storage.read(path)
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadFileError):
            storage.read(path)


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / checkpoint_files.checkpoint_name(7)
    storage.write(path, Checkpoint("lora", "key", 7, Weights(), {}, {}))
    path.rename(tmp_path / checkpoint_files.checkpoint_name(8))
    with pytest.raises(BadFileError, match="the header says step 7"):
        storage.read(tmp_path / checkpoint_files.checkpoint_name(8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": None},
        {"step": "seven"},
        {"scalars": "{"},
        {"scalars": "[" * 100_000},
        {"phase": None},
        {"phase_key": None},
    ],
    ids=["no step", "a step in words", "half of JSON", "deep JSON", "no phase", "no key"],
)
def test_a_whole_file_with_a_faulty_header_is_refused(tmp_path: Path, wrong: dict[str, str | None]) -> None:
    """Its digest is right: what wrote it was wrong."""
    header = {
        "format": str(storage.FORMAT),
        "phase": "lora",
        "phase_key": "key",
        "step": "7",
        "scalars": "{}",
        **wrong,
    }
    path = tmp_path / checkpoint_files.checkpoint_name(7)
    tensors.save(path, {}, {name: value for name, value in header.items() if value is not None})
    with pytest.raises(BadFileError, match="the header is incomplete"):
        storage.read(path)


def test_a_checkpoints_bytes_do_not_depend_on_the_order_of_its_scalars(tmp_path: Path) -> None:
    written = []
    for scalars in ({"a": 1, "b": 2}, {"b": 2, "a": 1}):
        storage.write(tmp_path / "x", Checkpoint("lora", "key", 7, Weights(), {}, scalars))
        written.append((tmp_path / "x").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_a_checkpoint_at_t5_xxls_size_holds_rows_not_tables(name: str, tmp_path: Path) -> None:
    """Two rows of T5-XXL are 8,192 numbers, its table 131,596,288: what is saved follows the rows."""
    numbers: optimizers.AdamWParams | optimizers.ProdigyParams = optimizers.AdamWParams(0.9, 0.99, 1e-8)
    if name == "prodigy":
        numbers = optimizers.ProdigyParams(0.9, 0.99, None, 1e-8, True, True, True, 1.0, 1e-6, None)
    table = nn.Embedding(32128, 4096, dtype=torch.bfloat16, _weight=torch.zeros(32128, 4096, dtype=torch.bfloat16))
    table.requires_grad_(False)
    rows = nn.Parameter(torch.randn(2, 4096))
    embedding = token_rows.TokenRows(table, 32100, rows)
    optimizer = optimizers.Optimizer([optimizers.ParameterGroup({"rows/t5": rows}, 1e-2, 0.0)], numbers)
    for _ in range(2):
        embedding(torch.tensor([[5, 32100, 32101, 1]])).float().square().sum().backward()
        optimizer.step(1.0)
    kept, scalars = optimizer.state()
    path = tmp_path / checkpoint_files.checkpoint_name(2)
    storage.write(
        path, Checkpoint("inversion", "key", 2, Weights(rows={"t5": rows.detach()}), kept, {"optimizer": scalars})
    )
    size = path.stat().st_size
    assert 3 * rows.numel() * 4 < size < 6 * rows.numel() * 4
    assert size < table.weight.numel() * 2 / 1000
