"""`fluxrun cache`, as typed."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.support.house import House
from tests.support.runs import export_bytes


@pytest.fixture
def mine(done: House, tmp_path: Path) -> House:
    """The finished run, to change."""
    shutil.copytree(done.folder, tmp_path / "mine")
    house = House.__new__(House)
    house.folder = tmp_path / "mine"
    return house


def test_what_the_cache_holds(mine: House) -> None:
    found = json.loads(mine.fluxrun("cache", "--json").out)
    on_disk = [path for path in (mine.folder / "runs" / "cache").rglob("*") if path.suffix in (".safetensors", ".json")]
    assert {one["kind"] for one in found["kinds"]} == {"clip", "latents", "t5", "views"}
    assert sum(one["entries"] for one in found["kinds"]) == len(on_disk)
    assert found["bytes"] == sum(path.stat().st_size for path in on_disk)
    lines = mine.fluxrun("cache").out.splitlines()
    assert [line.split()[:2] for line in lines if line.strip().startswith("latents")] == [["latents", "10"]]
    (mine.folder / "empty").mkdir()
    assert mine.fluxrun("cache", "--runs", "empty", "--json").out == '{\n "kinds": [],\n "bytes": 0\n}\n'


def test_what_nobody_asked_for_goes_and_is_made_again(mine: House) -> None:
    """What a run reads counts as asked for; the rest is forty days old."""
    old = time.time() - 40 * 86400
    entries = [path for path in (mine.folder / "runs" / "cache").rglob("*") if path.suffix in (".safetensors", ".json")]
    for path in entries:
        os.utime(path, (old, old))
    assert mine.fluxrun("queue", mine.spec("again", steps="steps = 1", prompts="prompts = []")).code == 0
    said = mine.fluxrun("cache", "prune")
    left = list((mine.folder / "runs" / "cache" / "latents").rglob("*.safetensors"))
    assert len(left) == 10  # the run read them
    assert len(list((mine.folder / "runs" / "cache" / "views").rglob("*.json"))) == 1
    gone = len(entries) - len([path for path in entries if path.exists()])
    assert 0 < gone < len(entries)
    assert said.out.startswith(f"{gone} entries removed, ")

    before = export_bytes(mine.folder / "runs" / "a")
    assert mine.fluxrun("cache", "prune", "--days", "0").code == 0
    assert not [
        path for path in (mine.folder / "runs" / "cache").rglob("*") if path.suffix in (".safetensors", ".json")
    ]
    assert mine.fluxrun("queue", "a.toml", "--runs", "other").code == 0
    assert export_bytes(mine.folder / "other" / "a") == before


def test_nothing_is_removed_under_a_queue(mine: House) -> None:
    from runner.core.process_identity import Process
    from runner.runs.run import Run

    run = Run(mine.folder / "runs", "a")
    lease = {"format": 1, "attempt": 1, "holder": Process.current().as_json()}
    run.lease_file.write_text(json.dumps(lease))
    said = mine.fluxrun("cache", "prune", "--days", "0")
    assert said.code == 3
    assert f"process {os.getpid()} is working on runs and may be about to read its cache" in said.err
    assert list((mine.folder / "runs" / "cache").rglob("*.safetensors"))


def test_an_engine_that_is_not_there_is_said_to_be_so(house: House) -> None:
    said = house.fluxrun("queue", house.spec(), "--engine", "ray")
    assert said.code == 2
    assert "'ray' is not available yet" in said.err
