"""The other commands, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.house import House
from tests.support.paths import PROJECT


def test_status_and_results_as_tables_and_json(done: House) -> None:
    status = done.fluxrun("status", "a")
    assert status.code == 0
    [row] = [line.split() for line in status.out.splitlines() if line.split()[:1] == ["a"]]
    assert row[:4] == ["a", "done", "export", "6/6"]
    [first, *_] = json.loads(done.fluxrun("status", "--json").out)
    assert (first["name"], first["state"], first["step"]) == ("a", "done", 6)
    results = done.fluxrun("results", "--json", "--sort", "train_loss")
    losses = [row["train_loss"] for row in json.loads(results.out)]
    assert losses == sorted(losses)
    assert "train loss" in done.fluxrun("results").out


def test_a_run_of_which_only_the_spec_is_left_has_its_steps_as_null(house: House) -> None:
    run = house.folder / "runs" / "a"
    run.mkdir(parents=True)
    (run / "spec.toml").write_text("")
    [only] = json.loads(house.fluxrun("status", "--json").out)
    assert only == {
        "name": "a", "state": "stopped", "step": 0, "steps": None,
        "error": "its state.json is missing or damaged; the same command goes on",
    }  # fmt: skip


def test_unknown_runs_and_columns_are_named(done: House) -> None:
    said = done.fluxrun("status", "b-not-there")
    assert said.code == 2
    assert "no such run in runs: b-not-there" in said.err
    said = done.fluxrun("results", "--sort", "speed")
    assert said.code == 2
    assert "'speed' is neither a column nor a key of these specs; columns are name, state," in said.err


def test_queue_prints_its_records_as_json(done: House) -> None:
    said = done.fluxrun("queue", "a.toml", "--json")
    [record] = json.loads(said.out)
    assert (record["name"], record["state"]) == ("a", "done")


def test_dry_run_is_the_plan(house: House) -> None:
    spec = house.spec()
    assert house.fluxrun("queue", spec, "--dry-run").out == house.fluxrun("plan", spec).out
    assert not (house.folder / "runs").exists()


def test_the_index_is_derived_from_the_folders(done: House) -> None:
    from runner.runs.index import write_index

    index = done.folder / "runs" / "index.jsonl"
    before = index.read_text()
    index.write_text("damaged")
    write_index(done.folder / "runs")
    assert index.read_text() == before


def test_a_folder_of_specs_and_a_missing_file(house: House, tmp_path: Path) -> None:
    (tmp_path / "specs").mkdir()
    assert "no *.toml in this folder" in house.fluxrun("plan", "specs").err
    said = house.fluxrun("plan", "none.toml")
    assert said.code == 2
    assert said.err.splitlines()[0] == "none.toml:1: no such file; a SPEC is a TOML file, or a folder of them"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_a_refusal_with_a_way_out(house: House) -> None:
    said = house.fluxrun("queue", house.spec(), "--gpus", "0")
    assert said.code == 1
    assert "this machine shows torch no CUDA GPU; use --gpus cpu" in said.err


def test_the_schema_is_json(house: House) -> None:
    assert json.loads(house.fluxrun("schema").out)["title"] == "fluxrun spec"


def test_the_readme_has_exactly_two_set_up_and_go_commands() -> None:
    lines = (PROJECT / "README.md").read_text().splitlines()
    commands = [line.strip() for line in lines if line.startswith("    python3.11 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("fluxrun queue specs/quickstart.toml")
    assert commands[1].endswith("pytest")
