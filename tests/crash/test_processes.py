"""Real processes, and what becomes of them: kills, stops and signals to the queue, its worker, or both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from runner.runs.run import Run
from tests.support.broken_runs import assert_same, go_on, lora, state, unbroken
from tests.support.house import House
from tests.support.paths import PROJECT
from tests.support.processes import alive, children

LONG = "steps = 40"
HASTY = "import sys; from runner.engine import supervisor; supervisor.HANG_SECONDS = 3.0; supervisor.HANG_STEPS = 1; "
# For the control: no death signal (prctl refuses 0), and a worker that does not notice its broken pipe either.
ORPHAN = (
    "import sys; from runner.core import process_identity; process_identity.PR_SET_PDEATHSIG = 0; "
    "from runner.engine import worker_main; worker_main.event_sender = lambda pipe: lambda event: None; "
)
CLI = "from runner.cli import main; main()"


class Night:
    """`fluxrun queue a.toml` in a process of its own."""

    def __init__(self, house: House, *, before: str = "", ignored: tuple[int, ...] = (), group: bool = False) -> None:
        self.house = house
        self.queue = subprocess.Popen(
            [sys.executable, "-c", f"{before}{CLI}", "queue", "a.toml", "--gpus", "cpu"],
            cwd=house.folder, stderr=subprocess.PIPE, text=True, start_new_session=group,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: _signals(ignored),
        )  # fmt: skip
        self.said = ""

    def until(self, text: str) -> None:
        assert self.queue.stderr is not None
        for line in self.queue.stderr:
            self.said += line
            if text in line:
                return
        raise AssertionError(f"it ended before {text!r}:\n{self.said}")

    def until_step(self, step: int) -> None:
        """By the checkpoints, since not every step is shown."""
        folder = self.house.folder / "runs" / "a" / "checkpoints"
        wait_for(lambda: any(int(path.stem[5:]) >= step for path in folder.glob("step-*")), f"step {step}")

    def worker(self) -> int:
        found: list[int] = []

        def begun() -> bool:
            found.extend(children(self.queue.pid))
            return bool(found)

        wait_for(begun, "a worker")
        assert len(found) == 1
        return found[0]

    def end(self) -> int:
        """Its code; everything that it said stands in `said`."""
        _, rest = self.queue.communicate(timeout=120)
        self.said += rest
        return self.queue.returncode


def _signals(ignored: Sequence[int]) -> None:
    """As a shell in a terminal starts a program, and not as these tests were started, under nohup perhaps."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)


def wait_for(condition: object, what: str, seconds: float = 120) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def long_night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    house = House(tmp_path_factory.mktemp("long"))
    return unbroken(house, lora(house, steps=LONG))


@pytest.fixture
def spec(house: House) -> Path:
    return lora(house, steps=LONG)


def test_killed_queue_and_killed_worker(house: House, spec: Path, long_night: Path) -> None:
    """kill -9 of the queue takes the worker along, nothing stays locked; kill -9 of a worker is mended by the queue."""
    first = Night(house)
    first.until_step(4)
    worker = first.worker()
    first.queue.kill()
    assert first.end() == -signal.SIGKILL
    wait_for(lambda: not alive(worker), "the worker's death", 5)

    second = Night(house)  # at once, with nothing to unlock
    second.until_step(state(house)["step"] + 4)
    os.kill(second.worker(), signal.SIGKILL)
    second.until("trying again")
    assert "a: the training process was killed by SIGKILL; trying again from step " in second.said
    assert second.end() == 0, second.said
    assert state(house)["state"] == "done"
    assert_same(house, other=long_night)


@pytest.mark.slow
def test_control_without_a_death_signal_an_orphan_trains_on(house: House, spec: Path) -> None:
    """And even then no second one begins beside it."""
    script = f"{ORPHAN}sys.argv[0] = 'fluxrun'; {CLI}"
    runner = house.write("orphan.py", script)
    worker = house.folder / "python"
    worker.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} {runner} "$@"\n')  # less -P -m runner
    worker.chmod(0o755)
    night = Night(house, before=f"import sys; sys.executable = {str(worker)!r}; ")
    night.until_step(4)
    orphan = night.worker()
    os.kill(orphan, signal.SIGSTOP)  # so that it is not done before the second command has looked
    night.queue.kill()
    night.end()
    try:
        said = house.fluxrun("queue", spec)
        assert said.code == 3
        assert "is working on runs/a; wait for it, or stop it" in said.err
        os.kill(orphan, signal.SIGCONT)
        wait_for(lambda: state(house)["state"] == "done", "the orphan's last step", 60)
    finally:
        if alive(orphan):
            os.kill(orphan, signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(house: House, spec: Path, long_night: Path) -> None:
    night = Night(house, before=HASTY)
    night.until_step(4)
    os.kill(night.worker(), signal.SIGSTOP)
    assert night.end() == 0, night.said
    assert "a: the training process has shown no sign of life for 3 s and is killed\n" in night.said
    assert "a: the training process hung and was killed; trying again from step " in night.said
    assert_same(house, other=long_night)


@pytest.mark.slow
def test_asked_once_and_asked_twice(house: House, spec: Path, long_night: Path) -> None:
    """SIGTERM: saved at the next step. A second one: at once. During the start: before a run has begun. Then to the
    end."""
    once = Night(house)
    once.until_step(4)
    once.queue.send_signal(signal.SIGTERM)
    assert once.end() == 3
    step = newest(house)
    assert f"a: stopped after step {step}; the same command goes on from there\n" in once.said
    assert (state(house)["state"], state(house)["step"]) == ("stopped", step)

    twice = Night(house)
    twice.until_step(step + 4)
    os.kill(twice.worker(), signal.SIGSTOP)  # so that both arrive before the next step ends
    twice.queue.send_signal(signal.SIGTERM)
    wait_for(lambda: pending(twice.worker(), signal.SIGTERM), "the first signal")
    os.kill(twice.worker(), signal.SIGCONT)
    twice.queue.send_signal(signal.SIGTERM)
    assert twice.end() == 3
    assert state(house)["state"] == "stopped"
    assert state(house)["error"].startswith(("stopped at once; the last checkpoint stands", "stopped after step"))

    early = Night(house)
    early.worker()
    early.queue.send_signal(signal.SIGTERM)
    assert early.end() == 3
    assert state(house)["state"] == "stopped"
    assert not Run(house.folder / "runs", "a").holder()

    go_on(house, spec)
    assert_same(house, other=long_night)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_is_one_request(house: House, spec: Path, long_night: Path) -> None:
    """It goes to the whole foreground group. The worker hears of it from the queue alone, once: so it saves."""
    night = Night(house, group=True)
    night.until_step(4)
    assert os.getpgid(night.worker()) != night.queue.pid
    os.killpg(night.queue.pid, signal.SIGINT)
    assert night.end() == 3
    assert f"a: stopped after step {newest(house)}; the same command goes on from there\n" in night.said
    assert "at once" not in night.said
    go_on(house, spec)
    assert_same(house, other=long_night)


@pytest.mark.slow
def test_a_hangup_is_a_request_unless_it_is_ignored(house: House, spec: Path, long_night: Path) -> None:
    night = Night(house)
    night.until_step(4)
    night.queue.send_signal(signal.SIGHUP)
    assert night.end() == 3
    step = newest(house)
    assert f"a: stopped after step {step}; the same command goes on from there\n" in night.said
    nohup = Night(house, ignored=(signal.SIGHUP,))
    nohup.until_step(step + 2)
    os.kill(nohup.worker(), signal.SIGHUP)
    nohup.queue.send_signal(signal.SIGHUP)
    assert nohup.end() == 0, nohup.said
    assert_same(house, other=long_night)


def newest(house: House) -> int:
    return max(int(path.stem[5:]) for path in (house.folder / "runs" / "a" / "checkpoints").glob("step-*"))


def pending(pid: int, number: int) -> bool:
    """Whether the process has yet to hear of a signal."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("SigPnd", "ShdPnd")) and int(line.split()[1], 16) >> (number - 1) & 1:
            return True
    return False
