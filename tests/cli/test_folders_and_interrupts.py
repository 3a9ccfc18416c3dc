"""Commands on a folder that is not there, on a run that is being trained, and ended by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console

from runner.cli import main
from runner.core import files
from runner.core.process_identity import Process, _boot, _started
from runner.jobs.prepare import prepare_jobs
from runner.jobs.timing import estimate_times
from runner.runs.claim import claim_run
from tests.support.house import House
from tests.support.run_folders import write_run

READERS = (
    ["status"], ["status", "--watch"], ["status", "--json"], ["results"], ["results", "--csv"], ["compare", "a", "b"],
    ["report"], ["board"], ["cache"], ["cache", "prune"], ["stop"], ["stop", "a"], ["sample", "a"], ["export", "a"],
)  # fmt: skip
SAID = (
    "Error: Invalid value for --runs: there is no folder 'nothere'; name the runs folder that `fluxrun queue` wrote to"
)


# ---- a folder that is not there ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", READERS, ids=" ".join)
def test_a_runs_folder_that_is_not_there_is_refused(
    house: House, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")  # what does not refuse would serve, or watch, for ever
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it watches"))
    said = house.fluxrun(*words, "--runs", "nothere")
    assert (said.code, said.out, said.err.splitlines()[-1]) == (2, "", SAID)
    assert not (house.folder / "nothere").exists()


def test_the_default_folder_is_no_exception(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no folder 'runs'" in house.fluxrun("results").err
    monkeypatch.setenv("FLUXRUN_RUNS", "elsewhere")
    assert "there is no folder 'elsewhere'" in house.fluxrun("results").err


def commands(group: click.Group, *before: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*before, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *before, name)


WITHOUT_RUNS = {("new",), ("schema",), ("convert",), ("_train",)}  # they touch no runs folder


def test_every_command_takes_the_shared_options_behind_its_own_name() -> None:
    found = dict(commands(main))
    assert len(found) > 15
    options = {name: {opt for one in command.params for opt in one.opts} for name, command in found.items()}
    assert {name for name, own in options.items() if "--runs" not in own} == WITHOUT_RUNS
    for name, own in options.items():
        if len(name) > 1:
            assert options[name[:-1]] <= own, f"{' '.join(name)} lacks options of {' '.join(name[:-1])}"


def test_the_cache_is_pruned_in_the_folder_named_before_or_behind(house: House) -> None:
    for words in (["cache", "prune", "--runs", "other"], ["cache", "--runs", "other", "prune"]):
        old = house.folder / "other" / "cache" / "latents" / "ab" / f"{'ab' * 32}.safetensors"
        old.parent.mkdir(parents=True, exist_ok=True)
        old.write_bytes(b"12")
        os.utime(old, (0, 0))
        said = house.fluxrun(*words, "--json")
        assert (said.code, json.loads(said.out)) == (0, {"entries": 1, "bytes": 2}), said.err
        assert not old.exists()


# ---- a run that is being trained -----------------------------------------------------------------------------------


@pytest.fixture
def queue() -> Iterator[Process]:
    """Another process, as a run's lease names its holder."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        yield Process(Process.current().host, _boot(), other.pid, _started(other.pid))
        assert other.stdin is not None
        other.stdin.close()


def held(house: House, queue: Process, state: str, **facts: Any) -> Path:
    """A spec whose run this queue has."""
    spec = house.spec("a")
    [job] = prepare_jobs([spec], house.folder / "runs", fetch=False, fresh=False)
    claim_run(job.run, job.spec, job.plan, "0", job.source.origin)
    job.run.write_state(state, **facts)
    files.write_json(job.run.lease_file, {"format": 1, "attempt": 1, "holder": queue.as_json()})
    return spec


def test_the_plan_of_a_run_that_is_running(house: House, queue: Process) -> None:
    began = time.mktime((2026, 1, 31, 2, 13, 0, 0, 0, -1))
    spec = held(house, queue, "running", step=3, attempt_started=began, started=began - 1e6)
    reason = f"process {queue.pid} trains it, since 2026-01-31 02:13; at step 3 of 6"
    assert house.fluxrun("plan", spec).out.splitlines()[0] == f"a  ({spec})  running: {reason}"
    [run] = json.loads(house.fluxrun("plan", spec, "--json").out)["runs"]
    assert (run["state"], run["reason"]) == ("running", reason)
    [job] = prepare_jobs([spec], house.folder / "runs", fetch=False, fresh=False)
    assert estimate_times([job], house.folder / "runs")[0].steps_left == 3


def test_the_plan_of_a_run_that_waits_in_a_queue(house: House, queue: Process) -> None:
    spec = held(house, queue, "waiting")
    out = house.fluxrun("plan", spec).out
    assert out.splitlines()[0] == f"a  ({spec})  waiting: in the queue of process {queue.pid}"


def test_the_picture_of_a_night_that_goes_on(house: House, queue: Process) -> None:
    from runner.cli import plan_view

    spec = held(house, queue, "running", step=3)
    jobs = prepare_jobs([spec], house.folder / "runs", fetch=False, fresh=False)
    console = Console(width=120)
    with console.capture() as shown:
        plan_view.print_plan(console, jobs, estimate_times(jobs, house.folder / "runs"), {}, time.time())
    assert f"running: process {queue.pid}" in shown.get()
    assert "3 of 6" in shown.get()


def test_a_changed_spec_of_a_running_run_is_still_refused(house: House, queue: Process) -> None:
    held(house, queue, "running", step=3)
    said = house.fluxrun("plan", house.spec("a", rank="rank = 8"))
    assert said.code == 2
    assert "lora.rank" in said.err


# ---- losses that do not compare ------------------------------------------------------------------------------------


def test_losses_that_do_not_compare_get_no_verdict(house: House) -> None:
    runs = house.folder / "runs"
    for name, loss in (("a", 0.5), ("b", 0.3)):
        write_run(runs, name, loss=loss, pictures=False)
    assert "b is below a at 9 of 9 noise levels" in house.fluxrun("compare", "a", "b").out
    spec = runs / "b" / "spec.toml"
    spec.write_text(spec.read_text().replace("holdout = 2", "holdout = 1"))
    out = house.fluxrun("compare", "a", "b").out
    assert "these eval losses do not compare" in out
    assert "noise levels" not in out
    assert "%" not in out
    assert "*" not in out
    assert "0.3000" in out


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_a_command_in_one_line(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runner.jobs.prepare.load_all", interrupted)
    monkeypatch.setattr("runner.runs.index.find_runs", interrupted)
    (house.folder / "runs").mkdir()
    for words in (["check", house.spec()], ["plan", house.spec()], ["results"]):
        said = house.fluxrun(*words)
        assert (said.code, said.out, said.err) == (3, "", "fluxrun: stopped by Ctrl-C\n")


def test_ctrl_c_ends_the_board_and_its_server(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    (house.folder / "runs").mkdir()
    server = house.write("server", "#!/bin/sh\necho $$ > pid\nexec sleep 60\n")
    server.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(server))

    def press() -> None:
        while not (house.folder / "pid").is_file() or not (house.folder / "pid").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    said = house.fluxrun("board")
    assert (said.code, said.err) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int((house.folder / "pid").read_text()), 0)
