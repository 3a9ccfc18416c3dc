"""Where runs go, and how they are told to stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from runner.core import hardware
from runner.core.errors import ExitCode
from runner.engine import slot_filling, slots
from runner.engine.progress import Screen
from runner.engine.worker import Worker
from runner.engine.worker_main import event_sender
from runner.runs.run import Run
from tests.support.house import House
from tests.support.paths import PROJECT


@pytest.mark.parametrize(
    ("gpus", "count", "most", "wanted"),
    [
        ("cpu", 2, 1, ["cpu", "cpu"]),
        (None, 1, 1, [None]),  # no GPU to be seen: torch decides
        ("0,2", 1, 1, ["0", "2"]),
        ("0,2", 1, 2, ["0,2"]),
    ],
)
def test_the_slots_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str | None, count: int, most: int, wanted: list[str | None]
) -> None:
    monkeypatch.setattr(slots, "visible_gpu_count", lambda: 0)
    assert [slot.gpus for slot in slots.make_slots(gpus, count, most, tmp_path)] == wanted


def test_every_visible_gpu_is_a_slot_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    made = slots.make_slots(None, 1, 1, tmp_path)
    assert [slot.gpus for slot in made] == ["0", "1"]
    assert [lock.name for slot in made for lock in slot.locks] == ["4", "7"]  # the card's own, whoever counts how
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.visible_gpu_count() == 0


@pytest.mark.parametrize(
    ("gpus", "options", "told"),
    [
        ("0,0", [], "expected GPU numbers such as 0,1, each once, or `cpu`, got '0,0'"),
        ("first", [], "expected GPU numbers such as 0,1, each once, or `cpu`, got 'first'"),
        ("0,1", ["--slots", "2"], "every GPU is one slot; --slots is for --gpus cpu"),
    ],
)
def test_what_is_no_gpu_is_refused(house: House, gpus: str, options: list[str], told: str) -> None:
    said = house.fluxrun("queue", house.spec(), "--gpus", gpus, *options)
    assert said.code == 2
    assert told in " ".join(said.err.split())
    assert not (house.folder / "runs").exists()


HOLD = "import sys, time\nfrom runner.core import locks\nfrom pathlib import Path\n" \
    "handle = locks.acquire_lock(Path(sys.argv[1]))\nprint(handle, flush=True)\ntime.sleep(60)"  # fmt: skip


def test_a_slot_that_another_queue_has_is_waited_for(house: House) -> None:
    """Said once, with the process; then the run begins as soon as that process is gone."""
    lock = house.folder / "runs" / ".slots" / "cpu-0"
    lock.parent.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PROJECT)}
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    said: list[str] = []

    def message(self: Screen, text: str, run: str = "") -> None:
        said.append(text)
        if text.startswith("waiting"):
            holder.kill()
            holder.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Screen, "message", message)
        spec = house.spec(steps="steps = 1", prompts="prompts = []")
        assert house.fluxrun("queue", spec, "--gpus", "cpu").code == 0
    assert said[0] == f"waiting for the CPU, which process {holder.pid} uses"
    assert said.count(said[0]) == 1


def test_the_queue_itself_imports_no_torch() -> None:
    """It is there all night beside the workers, and need not hold their memory."""
    code = "import sys; from runner.engine import supervisor, worker, slots, progress; " \
        "from runner.jobs import prepare; from runner.preflight import check; from runner.report import publish; " \
        "print('torch' in sys.modules, 'diffusers' in sys.modules)"  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert said.stdout == "False False\n"


def starting(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Workers are processes that do no more than this."""
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **rest: real([sys.executable, "-c", code], **rest))


def test_a_worker_that_goes_without_a_word_has_done_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its exit code; and one that died while it waited for a run harms nobody."""
    starting(monkeypatch, "")
    worker = Worker("cpu", None)
    assert worker.process.wait() == 0
    worker.submit(tmp_path, 1, [])
    assert worker.read_events() == []
    assert worker.exit_code == ExitCode.CRASHED
    assert not worker.accepts_runs
    worker.shutdown()


def test_what_a_worker_said_before_it_had_a_run_is_in_the_first_ones_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting(monkeypatch, "raise ImportError('libcudart is not there')")
    (tmp_path / "run.log").write_text("before\n")
    worker = Worker("cpu", None)
    worker.submit(tmp_path, 1, [])
    worker.process.wait()
    worker.read_events()
    worker.shutdown()
    first, *_, last = (tmp_path / "run.log").read_text().splitlines()
    assert (first, last) == ("before", "ImportError: libcudart is not there")


def test_what_it_said_is_in_no_log_once_it_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run that dies much later would be given what was said at the start."""
    starting(
        monkeypatch, "import sys; print('a warning', file=sys.stderr); print('{\"kind\": \"message\"}'); sys.exit(1)"
    )
    worker = Worker("cpu", None)
    worker.submit(tmp_path, 1, [])
    worker.process.wait()
    assert worker.read_events() == [{"kind": "message"}]
    worker.shutdown()
    assert worker.exit_code == 1
    assert not (tmp_path / "run.log").exists()


def test_workers_that_get_no_run_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each run, as far as there are slots, whose locks they leave alone; what was taken out is the queue's."""
    starting(monkeypatch, "import time; time.sleep(600)")
    monkeypatch.setattr(slot_filling, "Worker", Worker)
    own = slots.make_slots("cpu", 4, 1, tmp_path / "runs")
    with slot_filling.start_workers(own, 2) as workers:
        assert [*workers] == [0, 1]
        kept, gone = workers.pop(0), workers[1]
        assert kept.accepts_runs
        assert gone.accepts_runs
    assert gone.process.poll() is not None
    assert kept.accepts_runs
    kept.shutdown()
    assert kept.process.poll() is not None
    assert not (tmp_path / "runs").exists()


def test_an_event_is_whole_or_not_there() -> None:
    """However long a reason is, and however few bytes the pipe has left."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    send = event_sender(write)
    for _ in range(200):
        send({"kind": "run_ended", "reason": "ä" * 5000})
    os.close(write)
    with open(read, "rb") as pipe:
        lines = pipe.read().splitlines()
    assert 10 < len(lines) < 200  # what did not fit was dropped, not torn
    assert {json.loads(line)["reason"] for line in lines} == {"ä" * 300}


def test_stop_where_nothing_works(house: House) -> None:
    (house.folder / "runs").mkdir()
    said = house.fluxrun("stop")
    assert (said.code, said.err) == (1, "fluxrun: runs: no queue is working on it\n")
    said = house.fluxrun("stop", "a")
    assert (said.code, said.err) == (
        1, "fluxrun: runs/a: nothing is working on it; `fluxrun status` shows what each run is doing\n",
    )  # fmt: skip


def test_a_run_that_waits_is_not_begun(house: House) -> None:
    """Told while the run before it trains; the queue goes on with the one behind it."""
    from runner.training import recorder

    begin = recorder.RunRecorder.phase_started
    told: list[str] = []

    def beginning(self: Any, phase: Any, progress: Any) -> None:
        if self.run.name == "a" and not told:
            told.append(house.fluxrun("stop", "b").out)
        begin(self, phase, progress)

    specs = [house.spec(name, steps="steps = 1", prompts="prompts = []") for name in "abc"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder.RunRecorder, "phase_started", beginning)
        assert house.fluxrun("queue", *specs).code == 3
    assert told == ["b: will not be started\n"]
    states = {row["name"]: row["state"] for row in json.loads(house.fluxrun("status", "--json").out)}
    assert states == {"a": "done", "b": "stopped", "c": "done"}
    assert house.fluxrun("queue", *specs).code == 0


def test_stop_reaches_a_worker_and_the_queue_goes_on(house: House) -> None:
    long = house.spec("long", steps="steps = 100000", prompts="prompts = []")
    short = house.spec("short", steps="steps = 1", prompts="prompts = []")
    process = house.start("queue", long, short)
    try:
        run = Run(house.folder / "runs", "long")
        while (run.state().step or 0) < 1:
            assert process.poll() is None
            time.sleep(0.05)
        said = house.fluxrun("stop", "long")
        assert said.out.startswith("long: saves at its next step and stops (process ")
        _, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 3, err
    assert "long: stopped after step" in err
    assert "short: done" in err
    saved = max(step for step, _ in run.checkpoint_files())
    assert (run.state().state, run.state().step) == ("stopped", saved)


def test_four_slots_make_the_same_bytes_as_one(house: House) -> None:
    """Each spec goes to the first free slot; what a run becomes does not depend on which, nor on what trained there
    before."""
    names = [f"run{number}" for number in range(5)]
    for number, name in enumerate(names):
        path = house.spec(name, rank=f"rank = {number + 2}")
        path.write_text(f"seed = {number}\n" + path.read_text())
    specs = [f"{name}.toml" for name in names]
    found = {}
    for slots_given in ("4", "1"):
        runs = f"runs-{slots_given}"
        process = house.start("queue", *specs, "--gpus", "cpu", "--slots", slots_given, "--runs", runs)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
        found[slots_given] = {
            f"{name}/{path.name}": path.read_bytes()
            for name in names
            for path in sorted((house.folder / runs / name / "export").iterdir())
            if path.is_file()
        }
        starts = [Path(house.folder / runs / name / "run.log").read_text().count("encode: started") for name in names]
        assert starts == [1] * 5
    assert len(found["4"]) >= 15
    assert found["4"] == found["1"]


def test_two_queues_never_share_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    one, other = (slots.make_slots("0,1,2", 1, 1, tmp_path / name) for name in ("runs", "other-runs"))
    assert [slot.take() for slot in one[:2]] == [True, True]
    assert [slot.take() for slot in other] == [False, False, True]
    assert not one[2].take()
    one[0].release()
    assert other[0].take()
    [pair] = slots.make_slots("1,2", 1, 2, tmp_path / "third")  # one run on two cards has both or none
    one[1].release()
    assert not pair.take()
    other[2].release()
    assert pair.take()


def test_a_worker_on_a_cpu_keeps_its_heap_whole_and_one_on_a_gpu_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process is started with; a setting of the user's own stands."""
    told: list[dict[str, str]] = []
    real = subprocess.Popen

    def start(command: list[str], *, env: dict[str, str], **rest: Any) -> subprocess.Popen[bytes]:
        told.append(env)
        return real([sys.executable, "-c", ""], env=env, **rest)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for gpus, own in ((None, None), ("0", None), ("cpu", "glibc.malloc.check=3")):
        if own:
            monkeypatch.setenv("GLIBC_TUNABLES", own)
        Worker(gpus, None).shutdown()
    first, second, third = (env.get("GLIBC_TUNABLES") for env in told)
    assert first is not None
    assert "tcache_count=0" in first
    assert (second, third) == (None, "glibc.malloc.check=3")
