"""Every column of the results index, and the order of `fluxrun results --sort` by each."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import fields
from typing import Any

import pytest

from runner.runs.index import Record, write_index
from tests.support.house import House
from tests.support.run_folders import write_run

# Every column: its value in three runs, smallest first. `state` and `name` are their folders' own, `spec` is not sorted
# by.
COLUMNS: dict[str, tuple[Any, Any, Any]] = {
    "name": ("a", "b", "c"),
    "state": ("done", "failed", "stopped"),
    "spec_digest": ("0a", "1b", "2c"),
    "started": (9.0, 1e2, 1e3),
    "finished": (9.5, 1.5e2, 1.5e3),
    "wall_s": (9.25, 10.5, 200.0),
    "step": (9, 9, 100),
    "steps": (9, 10, 200),
    "s_per_step": (0.5, 1.5, 12.0),
    "peak_memory_bytes": (9 << 20, 10 << 20, 20 << 30),
    "train_loss": (0.09, 0.1, 0.11),
    "eval_loss": (0.08, 0.2, 0.3),
    "exports": (["export/a"], ["export/b"], ["export/c"]),
    "base": ("a/x", "b/x", "c/x"),
    "versions": ({"torch": "1"}, {"torch": "2"}, {"torch": "3"}),
    "error": ("bus", "disk", "fan"),
    "best_step": (3, 20, 100),
    "exported_step": (4, 30, 90),
    "ended": ("at", "because", "since"),
    "attempts": (1, 2, 13),
    "split": (2, 3, 16),
    "export_error": (1e-5, 1e-4, 2e-3),
    "warning": ("not pushed", "pushed late", "slow"),
}


@pytest.fixture
def night(house: House) -> House:
    """Three runs, b, a and c by their values, and one of which nobody knows anything."""
    for place, name in enumerate(COLUMNS["name"]):
        facts = {key: values[place] for key, values in COLUMNS.items() if key != "name"}
        folder = write_run(house.folder / "runs", name, rank=(4, 8, 16)[place], pictures=False)
        (folder / "state.json").write_text(json.dumps({**facts, "name": "not the folder's"}))
    bare = house.folder / "runs" / "B"
    bare.mkdir()
    (bare / "spec.toml").write_text("seed = 1\n")
    (bare / "state.json").write_text('{"state": "running"}')
    return house


def test_every_column_holds_what_the_run_folders_tell(night: House) -> None:
    """In the index, as JSON, and as CSV."""
    write_index(night.folder / "runs")
    rows = {
        row["name"]: row for row in map(json.loads, (night.folder / "runs" / "index.jsonl").read_text().splitlines())
    }
    shown = {row["name"]: row for row in json.loads(night.fluxrun("results", "--json").out)}
    listed = {row["name"]: row for row in csv.DictReader(io.StringIO(night.fluxrun("results", "--csv").out))}
    assert list(rows) == list(shown) == list(listed) == ["B", "a", "b", "c"]
    for key, values in COLUMNS.items():
        assert tuple(rows[name][key] for name in "abc") == values
        assert tuple(shown[name][key] for name in "abc") == values
        if key == "versions":
            assert tuple(listed[name]["versions.torch"] for name in "abc") == ("1", "2", "3")
        else:
            as_text = tuple(json.dumps(value) if isinstance(value, list) else str(value) for value in values)
            assert tuple(listed[name][key] for name in "abc") == as_text
    assert {name for name in rows["B"] if rows["B"][name] not in (None, [], {})} == {"name", "state", "error"}
    assert (rows["B"]["state"], rows["B"]["error"]) == ("stopped", "its process is gone")
    assert {field.name for field in fields(Record)} == {*COLUMNS, "spec", "origins"}
    assert set(rows["a"]) == set(COLUMNS)  # a spec stands in its own file


@pytest.mark.parametrize("key", COLUMNS)
def test_the_order_by_each_column(night: House, key: str) -> None:
    """Numbers as numbers; a run that has no such value comes last, whatever its name."""
    found = [row["name"] for row in json.loads(night.fluxrun("results", "--json", "--sort", key).out)]
    known = [name for name in found if name != "B"]
    assert known == ["a", "b", "c"]
    if key not in ("name", "state", "error", "exports", "versions"):
        assert found[-1] == "B"


def test_the_order_by_a_key_of_the_spec(night: House) -> None:
    """4, 8, 16: not 16, 4, 8. Where a run has a word instead of a number, it comes behind them."""
    spec = night.folder / "runs" / "b" / "spec.toml"
    spec.write_text(spec.read_text().replace("rank = 8", 'rank = "8"'))
    found = [row["name"] for row in json.loads(night.fluxrun("results", "--json", "--sort", "lora.rank").out)]
    assert found == ["a", "c", "b", "B"]
    found = [row["name"] for row in json.loads(night.fluxrun("results", "--json", "--sort", "train.lr").out)]
    assert found == ["a", "b", "c", "B"]  # alike: by name


def test_without_a_wish_results_come_by_name(night: House) -> None:
    assert [row["name"] for row in json.loads(night.fluxrun("results", "--json").out)] == ["B", "a", "b", "c"]
    said = night.fluxrun("results", "--sort", "speed")
    assert said.code == 2
    assert "'speed' is neither a column nor a key of these specs; columns are name, state, spec_digest, " in said.err
    assert "origins" not in said.err
    assert night.fluxrun("results", "--sort", "origins").code == 2
