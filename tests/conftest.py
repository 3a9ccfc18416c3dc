"""Fixtures of all tests. Most tests are sessions at the command line, on the bundled base, in this process; only
signals and kills need another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.house import House
from tests.support.run_folders import write_run


@pytest.fixture(autouse=True)
def _new_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has never trained: no test knows what another one took."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> House:
    """One finished pivotal run, `a`, that many tests look at; none changes it."""
    house = House(tmp_path_factory.mktemp("done"))
    said = house.fluxrun("queue", house.spec("a"))
    assert said.code == 0, said.err
    return house


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, no GPU, whatever the machine has."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "WANDB_MODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("runner.core.hardware.NVIDIA", tmp_path / "none")


@pytest.fixture
def night(tmp_path: Path) -> House:
    """Three runs, the second of which is the best."""
    house = House(tmp_path)
    for name, rank, loss in (("a", 4, 0.5), ("b", 8, 0.3), ("c", 16, 0.4)):
        write_run(tmp_path / "runs", name, rank=rank, loss=loss)
    return house
