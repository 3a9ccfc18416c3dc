"""`fluxrun results`: its columns, and its values as CSV."""

from __future__ import annotations

import csv
import io
import json

import runner
from tests.support.house import House
from tests.support.run_folders import write_run


def test_results_show_the_keys_that_differ(night: House) -> None:
    said = night.fluxrun("results", "--sort", "eval_loss")
    header, *rows = [line.split() for line in said.out.splitlines() if len(line.split()) > 3]
    assert header[:5] == ["run", "state", "eval", "loss", "lora.rank"]
    assert [row[:4] for row in rows] == [
        ["b", "done", "0.3000", "8"],
        ["c", "done", "0.4000", "16"],
        ["a", "done", "0.5000", "4"],
    ]
    by_rank = json.loads(night.fluxrun("results", "--json", "--sort", "lora.rank").out)
    assert [row["name"] for row in by_rank] == ["a", "b", "c"]
    assert by_rank[0]["spec"]["train.lr"] == 1e-3


def test_results_as_csv_load_into_pandas_and_parquet(night: House) -> None:
    import pandas

    write_run(night.folder / "runs", "odd", prompts=["=1+1", 'with "quotes", commas\nand lines'[:22]])
    spec = night.folder / "runs" / "odd" / "spec.toml"
    spec.write_text(spec.read_text().replace("resolution = 64", "resolution = [64, 96]"))
    said = night.fluxrun("results", "--csv")
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert [row["name"] for row in rows] == ["a", "b", "c", "odd"]
    assert [row["spec.data.resolution"] for row in rows] == ["64", "64", "64", "[64, 96]"]
    frame = pandas.read_csv(io.StringIO(said.out))
    assert frame.set_index("name").loc["b", "eval_loss"] == 0.3
    again = pandas.DataFrame(runner.table(runner.results(night.folder / "runs")))
    again.to_parquet(night.folder / "results.parquet")
    back = pandas.read_parquet(night.folder / "results.parquet")
    assert list(back["spec.lora.rank"]) == [4, 8, 16, 8]
    assert list(back["name"]) == ["a", "b", "c", "odd"]


def test_a_column_of_a_table_holds_one_kind_of_value() -> None:
    records = [
        runner.Record("a", "done", spec={"x": 1, "y": 1}),
        runner.Record("b", "done", spec={"x": "one", "y": 0.5}),
    ]
    assert [(row["spec.x"], row["spec.y"]) for row in runner.table(records)] == [("1", 1), ('"one"', 0.5)]
