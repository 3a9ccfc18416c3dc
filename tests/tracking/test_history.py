"""history.jsonl: the numbers of a run, whatever became of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

import runner
from runner.tracking.history import History, read_history
from tests.support.house import House


def test_history_survives_a_torn_line_and_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    first = History(path, 0)
    for step in range(1, 8):
        first.scalars({"train/loss": step / 10}, step)
    with path.open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed
    assert list(read_history(path)["train/loss"]) == [1, 2, 3, 4, 5, 6, 7]
    resumed = History(path, 5)
    assert list(read_history(path)["train/loss"]) == [1, 2, 3, 4, 5]
    resumed.scalars({"train/loss": float("nan"), "train/lr": 1e-4}, 6)
    resumed.scalars({"train/loss": 9.0}, 7)
    resumed.scalars({"train/loss": 0.25}, 7)
    found = read_history(path)
    assert found["train/lr"] == {6: 1e-4}
    assert found["train/loss"] == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5, 7: 0.25}


def test_history_takes_no_file_for_none_and_skips_what_is_no_line(tmp_path: Path) -> None:
    assert read_history(tmp_path / "none") == {}
    bad = tmp_path / "bad"
    bad.write_text(
        '[]\n{"step": "x"}\nnull\n{"step": 1, "a": "<b>", "c": 2, "d": 1' + "0" * 400 + "}\n\xff\n", encoding="latin-1"
    )
    assert read_history(bad) == {"c": {1: 2.0}}


def test_history_does_not_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    (tmp_path / "history.jsonl").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic link"):
        History(tmp_path / "history.jsonl", 0).scalars({"x": 1.0}, 1)
    assert (tmp_path / "target").read_text() == "kept"


def test_a_real_run_writes_its_history(done: House) -> None:
    found = runner.history(done.folder / "runs", "a")
    assert list(found["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert list(found["rows/norm TOK clip"]) == [1, 2, 3]  # the rows are fixed after the pivot
    drift = list(found["rows/drift TOK t5"].values())
    assert 0 < drift[0] < drift[1] < drift[2]
    from safetensors.torch import load_file

    rows = load_file(done.folder / "runs" / "a" / "export" / "a_emb.safetensors")["clip_l"]
    assert found["rows/norm TOK clip"][3] == pytest.approx(float(rows.norm(dim=1).mean()), rel=2e-3)  # exported in bf16
    [record] = [one for one in runner.results(done.folder / "runs") if one.name == "a"]
    assert found["eval/loss"][6] == pytest.approx(record.eval_loss, rel=1e-5)
