"""`fluxrun new`: a spec that plans, and the schema beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.newspec.from_diffusers import read_command
from runner.newspec.template_tables import TEMPLATES
from runner.spec.loader import load
from tests.support.house import House
from tests.support.paths import PICTURES


@pytest.fixture
def bare(tmp_path: Path) -> House:
    house = House.__new__(House)
    house.folder = tmp_path
    (tmp_path / "my-pictures").mkdir()
    return house


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_new_spec_plans(bare: House, template: str) -> None:
    said = bare.fluxrun("new", "a.toml", "--template", template)
    assert (said.code, said.err) == (0, "a.toml: `fluxrun plan a.toml` checks it\n")
    [loaded] = load([bare.folder / "a.toml"])
    assert not loaded.unreadable_keys
    (bare.folder / "my-pictures" / "a.png").write_bytes((PICTURES / "01.png").read_bytes())
    planned = json.loads(bare.fluxrun("plan", "a.toml", "--json").out)
    assert planned["errors"] == []
    kinds = {
        "pivotal": ["encode", "joint", "encode", "lora", "export"],
        "lora": ["encode", "lora", "export"],
        "inversion": ["encode", "inversion", "export"],
    }
    assert [phase["kind"] for phase in planned["runs"][0]["phases"]] == kinds[template]
    again = bare.fluxrun("new", "a.toml")
    assert again.code == 2
    assert "a.toml exists; name another file" in again.err


def test_the_schema_is_written_beside_a_new_spec(bare: House) -> None:
    """Even Better TOML and Taplo read the first line's `#:schema`, a path beside the spec: it works without a net."""
    bare.fluxrun("new", "sub/a.toml")
    first = (bare.folder / "sub" / "a.toml").read_text().splitlines()[0]
    assert first == "#:schema ./fluxrun.schema.json"
    beside = (bare.folder / "sub" / "fluxrun.schema.json").read_text()
    assert json.loads(beside)["title"] == "fluxrun spec"
    assert bare.fluxrun("schema", "--out", "x.json").out == ""
    assert (bare.folder / "x.json").read_text() == beside == bare.fluxrun("schema").out
    command = "x_flux.py --dataset_name=my-pictures --instance_prompt=a"
    bare.fluxrun("new", "b.toml", "--from-command", command)
    assert (bare.folder / "b.toml").read_text().splitlines()[0] == first


def test_a_refused_command_line_is_exit_2(bare: House) -> None:
    said = bare.fluxrun("new", "a.toml", "--from-command", "ls")
    assert said.code == 2
    assert "no script in the command" in said.err
    assert not (bare.folder / "a.toml").exists()
    assert read_command("x_flux.py --dataset_name=y --seed 4", {}).values["seed"] == 4
