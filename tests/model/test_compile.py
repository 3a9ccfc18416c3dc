"""Compiled blocks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from runner.model import device
from tests.support.house import House
from tests.support.objectives import gradients, with_model


def test_what_was_compiled_is_kept_in_the_users_own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    device.prepare_device(torch.device("cpu"), tf32=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "fluxrun" / "compile")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    device.prepare_device(torch.device("cpu"), tf32=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("lines", ["", 'quantize = "int8"', 'quantize = "nf4"', "gradient_checkpointing = 2"])
def test_compiled_blocks_train_close_to_the_plain_ones(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compile"))
    torch._dynamo.reset()  # or what the case before has compiled is taken from this process's memory
    loss, found = gradients(with_model(house, f"{lines}\ncompile = true"))
    plain, wanted = gradients(with_model(house, lines))
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=0)
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-3 * grad.norm(), name
    assert any((tmp_path / "compile").rglob("*"))
