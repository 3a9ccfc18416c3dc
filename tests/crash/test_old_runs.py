"""Run folders of earlier formats are read and gone on with; what is derived from run folders can be lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from runner.checkpoint import storage
from runner.runs.state import FORMAT
from tests.support.broken_runs import go_on, index
from tests.support.house import House
from tests.support.paths import OLD_RUNS

OLD = OLD_RUNS
FORMATS = sorted(path.name for path in OLD.glob("v*"))


@pytest.fixture
def old(tmp_path: Path, request: pytest.FixtureRequest) -> House:
    """A copy of one format's folder, its runs where they were when they were made."""
    house = House.__new__(House)
    house.folder = tmp_path / "house"
    shutil.copytree(OLD / getattr(request, "param", FORMATS[-1]), house.folder)
    (house.folder / "night").rename(house.folder / "runs")
    return house


every_format = pytest.mark.parametrize("old", FORMATS, indirect=True)


def test_there_is_one_of_this_format() -> None:
    assert f"v{FORMAT}" in FORMATS
    assert storage.FORMAT == FORMAT
    assert not [path for path in OLD.rglob("*") if path.is_file() and path.stat().st_size > 20_000]


@every_format
def test_it_is_read(old: House) -> None:
    rows = {row["name"]: row for row in json.loads(old.fluxrun("status", "--json").out)}
    assert (rows["half"]["state"], rows["half"]["step"], rows["half"]["steps"]) == ("stopped", 2, 4)
    assert rows["half"]["error"] == "stopped after step 2; the same command goes on from there"
    assert (rows["whole"]["state"], rows["whole"]["step"]) == ("done", 4)
    table = old.fluxrun("results")
    assert table.code == 0
    assert "half" in table.out
    for path in sorted(old.folder.glob("runs/*/checkpoints/*.safetensors")):
        found = storage.read(path)
        assert found.weights.lora.keys() == {
            f"transformer_blocks.0.attn.to_q.lora_{part}.weight" for part in ("A", "B")
        }
        assert found.weights.rows["clip"].shape == (2, 64)


@every_format
def test_it_goes_on(old: House) -> None:
    plan = old.fluxrun("plan", "half.toml", "whole.toml")
    assert "half  (half.toml)  resume: interrupted; last checkpoint at step 2 of 4\n" in plan.out
    said = go_on(old, "half.toml", "whole.toml")
    assert "whole: skipped, done (same spec, data and base; its exports are there)\n" in said.err
    assert "half: resuming at step 2 of 4\n" in said.err
    export = Path("export/pytorch_lora_weights.safetensors")
    ours, theirs = load_file(old.folder / "runs/half" / export), load_file(old.folder / "runs/whole" / export)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-5  # another machine rounds otherwise


@pytest.mark.parametrize("damage", ["deleted", "garbage", "another night's"])
def test_the_index_is_derived(old: House, damage: str) -> None:
    file = old.folder / "runs" / "index.jsonl"
    go_on(old, "whole.toml")
    before = old.fluxrun("results", "--json").out
    assert {name: record["state"] for name, record in index(old).items()} == {"half": "stopped", "whole": "done"}
    file.unlink()
    if damage != "deleted":
        file.write_text("\0" * 512 if damage == "garbage" else '{"name": "elsewhere", "state": "done"}\n')
    assert old.fluxrun("results", "--json").out == before
    (old.folder / "runs" / "whole" / "state.json").unlink()  # so that the next command has something to do
    go_on(old, "whole.toml")
    assert {name: record["state"] for name, record in index(old).items()} == {"half": "stopped", "whole": "done"}


@pytest.mark.parametrize("content", [None, b"", b"\0" * 300, b'{"state": "runn'])
def test_a_lost_state_is_told_and_gone_on_from(old: House, content: bytes | None) -> None:
    file = old.folder / "runs" / "half" / "state.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    [row] = json.loads(old.fluxrun("status", "half", "--json").out)
    assert (row["state"], row["step"], row["steps"]) == ("stopped", 2, 4)
    assert row["error"] == "its state.json is missing or damaged; the same command goes on"
    assert "resume: interrupted; last checkpoint at step 2 of 4" in old.fluxrun("plan", "half.toml").out
    if content == b"":
        said = go_on(old, "half.toml")
        assert "half: resuming at step 2 of 4\n" in said.err
        assert json.loads(file.read_text())["state"] == "done"
