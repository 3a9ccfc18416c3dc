"""What a queue makes of workers that fail: each number of its rules, by sessions whose workers only pretend to
train."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.core import files
from runner.core.errors import ExitCode
from runner.engine import queue_state, supervisor
from tests.support.house import House, Said
from tests.support.scripted_workers import Attempt, scripted_workers

CRASH = Attempt(ExitCode.CRASHED, "RuntimeError: a cosmic ray")
AGAIN = "the same command tries again from the last checkpoint"


def queue(house: House, names: str, *options: str | Path) -> Said:
    """`fluxrun queue` with a spec for each letter; those that are there already stay as they are."""
    specs = [house.folder / f"{name}.toml" for name in names]
    for path in specs:
        if not path.exists():
            house.spec(path.stem)
    return house.fluxrun("queue", *specs, "--gpus", "cpu", "--no-check", *options)


def states(house: House) -> dict[str, tuple[str, str]]:
    """(state, error) by name, of `fluxrun status`."""
    rows = json.loads(house.fluxrun("status", "--json").out)
    return {row["name"]: (row["state"], row.get("error") or "") for row in rows}


# ---- after a crash -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "tries"), [((), 3), (("--retries", "0"), 1), (("--retries", "5"), 6)])
def test_a_crash_is_tried_again_as_often_as_retries_says(house: House, options: tuple[str, ...], tries: int) -> None:
    """Each attempt saves a step, so that nothing else ends it."""
    attempts = [Attempt(ExitCode.CRASHED, "a cosmic ray", saves=step) for step in range(1, 9)]
    with scripted_workers({"a": attempts}) as calls:
        said = queue(house, "a", *options)
    assert said.code == 1
    assert calls.count("a begins") == tries
    retries = [f"a: a cosmic ray; trying again from step {n} (retry {n} of {tries - 1})\n" for n in range(1, tries)]
    last = f"a: failed: a cosmic ray (attempt {tries} of this queue; last checkpoint at step {tries}); {AGAIN}\n"
    assert said.err == "".join([*retries, last])


def test_three_attempts_in_a_row_without_a_new_step_are_the_last(house: House) -> None:
    """However many retries are left; one that saves a step begins the count again."""
    saved = Attempt(ExitCode.CRASHED, "a cosmic ray", saves=2)
    with scripted_workers({"a": [CRASH, CRASH, saved, CRASH, CRASH, CRASH, CRASH]}) as calls:
        said = queue(house, "a", "--retries", "9")
    assert said.code == 1
    assert calls.count("a begins") == 6
    assert said.err.endswith(f"(attempt 6 of this queue; last checkpoint at step 2); {AGAIN}\n")


def test_a_run_that_crashed_goes_on_before_the_next_begins(house: House) -> None:
    with scripted_workers({"a": [CRASH]}) as calls:
        assert queue(house, "ab").code == 0
    assert calls == ["a begins", "a begins", "b begins"]


@pytest.mark.parametrize(
    ("code", "told", "state", "exit_code"),
    [
        (-signal.SIGKILL, "failed: the training process was killed by SIGKILL (attempt 1 of this queue; ", "failed", 1),
        (5, "failed: the training process ended with code 5; runs/a/run.log may say why (attempt 1", "failed", 1),
        (ExitCode.FAILED, "failed: why", "failed", 1),
        (ExitCode.BAD_SPEC, "failed: why", "failed", 1),
        (ExitCode.DISK, "paused: why\n", "stopped", 3),
        (ExitCode.STOPPED, "why\n", "stopped", 3),
        (ExitCode.LOCKED, "not run: why\n", "stopped", 3),
        (-signal.SIGTERM, "stopped before it began\n", "stopped", 3),
        (-signal.SIGINT, "stopped before it began\n", "stopped", 3),
    ],
)
def test_how_each_end_of_a_worker_is_told(house: House, code: int, told: str, state: str, exit_code: int) -> None:
    """And the next run begins, whatever it was."""
    reason = "why" if code in set(ExitCode) else ""
    with scripted_workers({"a": [Attempt(code, reason)]}) as done:
        said = queue(house, "ab", "--retries", "0")
    assert (said.code, done) == (exit_code, ["a begins", "b begins"])
    assert said.err.startswith(f"a: {told}")
    assert states(house)["a"][0] == state
    assert states(house)["b"][0] == "done"


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (2, "1, 2 to a step"),
        (3, "1, 3 to a step"),
        (4, "2, 2 to a step"),
        (6, "3, 2 to a step"),
        (9, "1, 9 to a step"),
    ],
)
def test_out_of_memory_cuts_the_micro_batch(house: House, batch: int, told: str) -> None:
    """In two, or into single pictures where it is odd; what was found out is there for the next command."""
    house.spec("a", batch_size=f"batch_size = {batch}")
    with scripted_workers({"a": [Attempt(ExitCode.MEMORY, "out of memory")]}) as began:
        said = queue(house, "a", "--retries", "0")  # it is no crash
    assert (said.code, began) == (0, ["a begins", "a begins"])
    assert said.err == f"a: out of memory; trying again with micro-batches of {told}\n"
    parts = int(told.split(", ")[1].split(maxsplit=1)[0])
    assert json.loads((house.folder / "runs" / "a" / "state.json").read_text())["split"] == parts


@pytest.mark.parametrize(("batch", "tries"), [(1, 1), (8, 2)])
def test_out_of_memory_is_met_once(house: House, batch: int, tries: int) -> None:
    house.spec("a", batch_size=f"batch_size = {batch}")
    with scripted_workers({"a": [Attempt(ExitCode.MEMORY, "out of memory")] * 3}) as began:
        said = queue(house, "a")
    assert (said.code, len(began)) == (1, tries)
    assert "a: failed: out of memory; set model.gradient_checkpointing = true and queue it again, " in said.err


# ---- the circuit breaker -------------------------------------------------------------------------------------------


def off_the_bus(device: int) -> Attempt:
    return Attempt(ExitCode.FAILED, f"device {device} fell off the bus")


def test_three_in_a_row_that_fail_alike_stop_the_queue(house: House) -> None:
    """Numbers, the run's folder and its name, as a word, may differ; two are not enough."""
    reasons = ["b: device 0 of runs/b fell off", "c: device 12 of runs/c fell off", "d: device 7 of runs/d fell off"]
    first = {name: [Attempt(ExitCode.FAILED, reason)] for name, reason in zip("bcd", reasons, strict=True)}
    with scripted_workers({"a": [Attempt(ExitCode.FAILED, "the fan sings")], **first}) as calls:
        said = queue(house, "abcde")
    assert said.code == 1
    assert calls == [f"{name} begins" for name in "abcd"]
    assert said.err.endswith(f"stopped: 3 runs in a row failed alike; the last: {reasons[2]}\n")
    assert states(house)["e"] == ("stopped", f"not begun: 3 runs in a row failed alike ({reasons[2]})")


def test_a_done_run_between_them_begins_the_count_again(house: House) -> None:
    script = {name: [off_the_bus(number)] for number, name in enumerate("acd")}
    with scripted_workers(script) as calls:  # a fails, b is done, c and d fail: two in a row
        said = queue(house, "abcde")
    assert calls == [f"{name} begins" for name in "abcde"]
    assert said.code == 1
    assert "in a row" not in said.err
    assert states(house)["e"] == ("done", "")


def test_another_reason_between_them_begins_the_count_again(house: House) -> None:
    script = {
        "a": [off_the_bus(0)],
        "b": [Attempt(ExitCode.FAILED, "the fan sings")],
        "c": [off_the_bus(2)],
        "d": [off_the_bus(3)],
    }
    with scripted_workers(script) as calls:
        said = queue(house, "abcde")
    assert calls[-1] == "e begins"
    assert "in a row" not in said.err


def test_the_last_run_needs_no_stop(house: House) -> None:
    """Three alike, and nothing that waits: the queue ends by itself, and says no more than that they failed."""
    with scripted_workers({name: [off_the_bus(number)] for number, name in enumerate("abc")}):
        assert "in a row" not in queue(house, "abc").err


# ---- a worker that falls silent -----------------------------------------------------------------------------------


class Clock(SimpleNamespace):
    """`time`, for the queue: moves on only while it sleeps."""

    now: float

    def __init__(self) -> None:
        super().__init__(now=1000.0)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        self.now += 1.0


def set_clock(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    for module in (queue_state, supervisor):
        monkeypatch.setattr(module, "time", clock)


@pytest.mark.parametrize(
    ("steps", "silence"),
    [((1.0,), 601), ((11.0,), 601), ((20.0,), 1001), ((20.0, 40.0, 20.0), 2001)],
    ids=["quick", "still under ten minutes", "slow", "the slowest counts"],
)
def test_how_long_a_worker_may_be_silent_between_steps(
    house: House, monkeypatch: pytest.MonkeyPatch, steps: tuple[float, ...], silence: int
) -> None:
    """Ten minutes, or fifty of its slowest steps."""
    set_clock(monkeypatch, Clock())
    with scripted_workers({"a": [Attempt(None, steps=steps)]}) as calls:
        said = queue(house, "a")
    assert (said.code, calls) == (0, ["a begins", "a killed", "a begins"])
    assert said.err.endswith(
        f"a: the training process has shown no sign of life for {silence} s and is killed\n"
        "a: the training process hung and was killed; trying again from step 0 (retry 1 of 2)\n"
    )


def test_before_its_first_step_a_worker_may_take_as_long_as_it_likes(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    set_clock(monkeypatch, clock)

    def loads_for_a_day() -> None:
        clock.now += 86400.0

    with scripted_workers({"a": [Attempt(ExitCode.DONE, then=loads_for_a_day)]}) as calls:
        assert queue(house, "a").code == 0
    assert calls == ["a begins"]


# ---- the disk ------------------------------------------------------------------------------------------------------


def test_a_run_that_the_disk_has_no_room_for_is_not_begun(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte short of what the plan says it will write, less what is there, and 16 MiB; with that byte the same command
    goes on."""
    house.spec("a")
    need = json.loads(house.fluxrun("plan", "a.toml", "--json").out)["runs"][0]["disk_bytes"]
    there: list[int] = []

    def free(_: Any, folder: Path) -> int:
        have = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        there.append(need - have + (16 << 20) - (not there))
        return there[-1]

    monkeypatch.setattr(files.Disk, "free", free)
    with scripted_workers({}) as calls:
        said = queue(house, "a")
        assert (said.code, calls) == (3, [])
        assert said.err.startswith("a: paused: the run needs about ")
        assert said.err.endswith("; free some space, then the same command goes on\n")
        assert states(house)["a"][0] == "stopped"
        assert queue(house, "a").code == 0
    assert calls == ["a begins"]


# ---- asked to stop -------------------------------------------------------------------------------------------------


def test_fail_fast_asks_the_others_once_and_begins_nothing(house: House) -> None:
    """Two slots: b trains while a fails."""
    with scripted_workers({"a": [Attempt(ExitCode.FAILED, "why")], "b": [Attempt(None)]}) as calls:
        said = queue(house, "abc", "--slots", "2", "--fail-fast")
    assert said.code == 1
    assert calls == ["a begins", "b begins", "b asked"]
    assert states(house)["c"] == ("stopped", "not begun: --fail-fast")
    with scripted_workers({}) as calls:
        assert queue(house, "abc", "--slots", "2", "--fail-fast").code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_queue_passes_a_signal_on_and_goes_on_with_the_same_command(house: House, number: signal.Signals) -> None:
    before = signal.signal(number, lambda *_: pytest.fail(f"{number.name} reached nobody"))
    try:
        with scripted_workers({"a": [Attempt(None, then=lambda: os.kill(os.getpid(), number))]}) as calls:
            said = queue(house, "ab")
    finally:
        signal.signal(number, before)
    assert (said.code, calls) == (3, ["a begins", "a asked"])
    assert states(house)["b"] == ("stopped", "stopped before it began")
    with scripted_workers({}) as calls:
        assert queue(house, "ab").code == 0
    assert calls == ["a begins", "b begins"]


def test_the_third_signal_kills(house: House) -> None:
    """The second is passed on like the first: a worker then stops at once, without a save."""

    def three_times() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)

    deaf = Attempt(None, then=three_times)
    with scripted_workers({"a": [deaf]}) as calls:
        said = queue(house, "a")
    assert calls == ["a begins", "a asked", "a asked", "a killed"]
    assert said.code == 1
    assert states(house)["a"][1].startswith("the training process was killed by SIGKILL")
