"""The figures of the results page, of nights whose numbers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.report import page
from runner.report.curves import MAX_POINTS, thinned
from runner.report.page_run import read_page_runs
from runner.runs.index import Record
from runner.runs.short_names import short_labels
from runner.runs.spec_differences import distinguishing_keys, have_comparable_losses
from tests.support.run_folders import write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    for name, loss, state in (("a", 0.5, "done"), ("b", 0.25, "done"), ("c", 0.75, "failed")):
        write_run(runs, name, loss=loss, state=state, pictures=False, wall_s=3600.0)
    return runs


def test_the_best_run_is_that_with_the_lowest_eval_loss(runs: Path) -> None:
    state = runs / "a" / "state.json"
    state.write_text(
        json.dumps({key: value for key, value in json.loads(state.read_text()).items() if key != "eval_loss"})
    )
    found = page._summary(read_page_runs(runs))
    assert found == {
        "count": 3, "states": [("done", 2), ("failed", 1)], "wall": "3:00:00",
        "best": {"label": "b", "at": 1, "loss": "0.2500"}, "failed": ["c"],
    }  # fmt: skip


def test_a_row_of_the_table_has_each_number_and_what_to_sort_it_by(runs: Path) -> None:
    [done, _, failed] = [page._row(one) for one in read_page_runs(runs)]
    assert (done["eval"], done["train"]) == (("0.5000", 0.5), ("0.5100", 0.51))
    assert (done["steps"], done["pace"], done["memory"]) == (("100", 100), ("1.58", 1.58), ("20.00", 20 << 30))
    assert done["wall"] == ("1:00:00", 3600.0)
    assert failed["steps"] == ("100/100", 100)
    assert done["spec"]["lora.rank"] == ("8", 8)
    assert done["spec"]["data.source"] == ("pictures", None)


def test_a_long_curve_is_thinned_to_means() -> None:
    """Over equal spans, each at its last step; a short one stays as it is."""
    short = {step: float(step) for step in range(1, MAX_POINTS + 1)}
    assert thinned(short) == [list(short), list(short.values())]
    steps, values = thinned({step: float(step) for step in range(1, 4 * MAX_POINTS + 1)})
    assert len(steps) == MAX_POINTS
    assert (steps[0], values[0]) == (4, 2.5)
    assert steps[-1] == 4 * MAX_POINTS
    assert values[-1] == pytest.approx(4 * MAX_POINTS - 1.5, rel=1e-4)


def test_losses_are_compared_where_they_are_of_the_same_pictures() -> None:
    one = {"data.source": "x", "data.holdout": 2, "lora.rank": 4}
    assert have_comparable_losses([one, {**one, "lora.rank": 8}])
    for key in ("model.base", "data.source", "data.holdout", "data.resolution", "data.prompt", "train.guidance"):
        assert not have_comparable_losses([one, {**one, key: "other"}]), key


def test_what_tells_runs_apart() -> None:
    def record(rank: int, alpha: float, typed: str = "lora.rank") -> Record:
        origins = {"lora.rank": "set in a.toml", typed: "set in a.toml"}
        return Record("a", "done", spec={"seed": 0, "lora.rank": rank, "lora.alpha": alpha}, origins=origins)

    assert distinguishing_keys([record(4, 4.0), record(8, 8.0)]) == ["lora.rank"]  # alpha follows from it
    assert distinguishing_keys([record(4, 4.0, typed="lora.alpha"), record(8, 1.0, typed="lora.alpha")]) == [
        "lora.rank",
        "lora.alpha",
    ]
    assert distinguishing_keys([record(4, 4.0), record(4, 8.0)]) == ["lora.alpha"]  # of another fluxrun's defaults
    assert short_labels(["s/lora.rank=4,train.lr=1", "s/lora.rank=8,train.lr=1"]) == ["rank=4, lr=1", "rank=8, lr=1"]
    assert short_labels(["s/lora.rank=4", "t/lora.rank=4"]) == ["s: rank=4", "t: rank=4"]
    assert short_labels(["s/a.x=1", "s/b.x=1"]) == ["a.x=1", "b.x=1"]  # alike without their tables
