"""`fluxrun status --watch`: what it shows of run folders."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from runner.cli import watch
from runner.core import locks
from runner.runs.state import RunState
from tests.support.house import House


def run_folder(runs: Path, name: str, **state: object) -> Path:
    folder = runs / name
    (folder / "samples").mkdir(parents=True)
    (folder / "spec.toml").write_text(f'name = "{name}"\n')
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def shown(runs: Path, *names: str) -> str:
    out = io.StringIO()
    Console(file=out, width=240).print(watch.view(runs, names, 240))
    return out.getvalue()


def test_what_runs_comes_first_with_its_curve_time_and_picture(tmp_path: Path) -> None:
    going = run_folder(tmp_path, "b", state="running", step=50, steps=150, s_per_step=2.0, train_loss=0.25)
    (going / "history.jsonl").write_text(
        "".join(json.dumps({"step": step, "train/loss": 100.0 - step}) + "\n" for step in range(1, 51))
    )
    for name in ("step-000010-0.png", "step-000040-0.png", "before-after.png"):
        (going / "samples" / name).write_bytes(b"")
    run_folder(tmp_path, "a", state="done", step=10, steps=10, train_loss=0.5)
    run_folder(tmp_path, "c", state="failed", step=3, steps=10, error="[bold]the disk[/bold] said no")
    with locks.hold_lock(going / ".lock"):
        lines = [line.strip() for line in shown(tmp_path).splitlines() if line.strip()]
    assert lines[0] == "1 running, 1 failed, 1 done; all done in about 3:20"
    rows = [line for line in lines if line.split()[0] in ("a", "b", "c")]
    assert [row.split()[:2] for row in rows] == [["b", "running"], ["c", "failed"], ["a", "done"]]
    assert "██▇▇▇▇▆▆▆▅▅▅▄▄▄▃▃▃▃▂▂▂▁▁" in rows[0]
    assert rows[0].split()[-2:] == ["3:20", str(going / "samples" / "step-000040-0.png")]
    assert "c: [bold]the disk[/bold] said no" in lines
    assert "running" not in shown(tmp_path, "a")


def test_waiting_runs_are_shared_among_the_running_ones() -> None:
    running = RunState("running", step=0, steps=100, s_per_step=1.0)
    waiting = RunState("waiting", steps=200)
    assert watch.time_left([running]) == 100
    assert watch.time_left([running, waiting]) == 300
    assert watch.time_left([running, running, waiting]) == 200
    assert watch.time_left([waiting]) is None


@pytest.mark.parametrize(
    ("values", "wanted"), [([], ""), ([1.0], "▁"), ([1.0, 8.0], "▁█"), ([3.0, 3.0], "▁▁"), (list(range(8)), "▁▂▃▄▅▆▇█")]
)
def test_spark_lines(values: list[float], wanted: str) -> None:
    assert watch.sparkline(values) == wanted


def test_slots_that_are_taken_are_named(tmp_path: Path) -> None:
    (tmp_path / ".slots").mkdir()
    with locks.hold_lock(tmp_path / ".slots" / "cpu-0"):
        assert watch.headline(tmp_path, []) == f"no runs yet; slots: cpu-0 (process {os.getpid()})"
    assert watch.headline(tmp_path, []) == "no runs yet"


def test_watch_draws_until_it_is_interrupted(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    (house.folder / "runs").mkdir()
    said = house.fluxrun("status", "--watch")
    assert (said.code, said.err) == (0, "")
    assert "no runs yet" in said.out
