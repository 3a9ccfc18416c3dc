"""Many who want one run: exactly one gets it, whoever they are and however the last one ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.core import files
from runner.core.errors import FluxrunError, LockHeldError
from runner.core.process_identity import Process
from runner.jobs.job import Job
from runner.jobs.prepare import prepare_jobs
from runner.runs import claim, lease
from runner.runs.claim import claim_run
from runner.runs.run import Run
from runner.runs.state import FORMAT
from tests.support.broken_runs import assert_same, failing, go_on, lora, unbroken
from tests.support.house import House

RACERS = 50


def job_of(house: House) -> Job:
    [job] = prepare_jobs([lora(house)], house.folder / "runs", fetch=False, fresh=False)
    return job


def race(job: Job, start: Any, out: Any, go: Any, locked: bool) -> None:
    """One of fifty: waits for the shot, tries, tells, and lives on until all have tried."""
    if not locked:
        from contextlib import nullcontext

        Run.locked = lambda self: nullcontext()  # type: ignore[method-assign]
        write_claim = claim._write_claim

        def slow_write_claim(*arguments: Any) -> None:
            write_claim(*arguments)
            time.sleep(0.05)

        claim._write_claim = slow_write_claim  # type: ignore[assignment]
    start.wait()
    try:
        out.put((os.getpid(), claim_run(job.run, job.spec, job.plan, "0"), ""))
    except FluxrunError as error:
        out.put((os.getpid(), 0, str(error)))
    go.wait(60)


def run_race(job: Job, *, locked: bool) -> list[tuple[int, int, str]]:
    """(pid, attempt or 0, what it was told) of every racer."""
    fork = multiprocessing.get_context("fork")
    start, go, out = fork.Barrier(RACERS), fork.Event(), fork.Queue()
    racers = [fork.Process(target=race, args=(job, start, out, go, locked)) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    told = [out.get(timeout=60) for _ in racers]
    go.set()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    return told


def test_fifty_race_for_one_run(house: House) -> None:
    job = job_of(house)
    files.make_folder(job.run.folder)
    told = run_race(job, locked=True)
    [winner] = [(pid, attempt) for pid, attempt, _ in told if attempt]
    assert winner[1] == 1
    refusals = {text for _, attempt, text in told if not attempt}
    assert refusals == {f"process {winner[0]} is working on {job.run.folder}; wait for it, or stop it"}
    told = run_race(job, locked=True)  # all of the first race are dead: nothing is to be unlocked
    assert [attempt for _, attempt, _ in told if attempt] == [2]


def test_control_without_the_lock_there_are_several_winners(house: House) -> None:
    job = job_of(house)
    files.make_folder(job.run.folder)
    assert sum(attempt > 0 for _, attempt, _ in run_race(job, locked=False)) > 1


def leased(run: Run, holder: Process, attempt: int = 3) -> None:
    files.make_folder(run.folder)
    files.write_json(run.lease_file, {"format": FORMAT, "attempt": attempt, "holder": holder.as_json()})


def parent() -> Process:
    """A process that lives and is not this one."""
    own = Process.current()
    started = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
    return replace(own, pid=os.getppid(), started=started)


def test_who_still_holds_a_run(house: House) -> None:
    """A living one does. A pid that another process has by now, or of an earlier boot, is dead."""
    job = job_of(house)
    living = parent()
    leased(job.run, living)
    with pytest.raises(LockHeldError, match=f"process {living.pid} is working on"):
        claim_run(job.run, job.spec, job.plan, "0")
    assert living.started is not None
    for dead in (replace(living, started=living.started + 1), replace(living, boot="an earlier one"),
                 replace(living, pid=2**22 + 1), replace(Process.current(), started=1)):  # fmt: skip
        leased(job.run, dead)
        assert job.run.holder() is None
        assert claim_run(job.run, job.spec, job.plan, "0") == 4


def test_a_zombie_holds_nothing(house: House) -> None:
    job = job_of(house)
    pid = os.fork()
    if pid == 0:
        leased(job.run, Process.current())
        os._exit(0)
    deadline = time.monotonic() + 10
    while job.run.lease().holder is None and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        holder = job.run.lease().holder
        assert holder is not None
        assert holder.pid == pid
        while job.run.holder() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert job.run.holder() is None
    finally:
        os.waitpid(pid, 0)


def test_a_process_on_another_host_is_believed_while_the_state_changes(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(house)
    leased(job.run, replace(Process.current(), host="elsewhere", pid=7))
    with pytest.raises(LockHeldError, match="process 7 on elsewhere is working on"):
        claim_run(job.run, job.spec, job.plan, "0")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + lease.REMOTE_TIMEOUT - 5)
    assert job.run.holder() is not None
    monkeypatch.setattr(time, "time", lambda: now + lease.REMOTE_TIMEOUT + 5)
    assert job.run.holder() is None
    assert claim_run(job.run, job.spec, job.plan, "0") == 4


@pytest.mark.parametrize("step", [0, 3], ids=["before its first save", "before its last save"])
def test_a_worker_whose_attempt_is_over_writes_nothing(house: House, step: int) -> None:
    """Its lease was taken over while it was busy: no checkpoint, state or export of it, and it says so."""
    run = Run(house.folder / "runs", "a")
    before: dict[str, Any] = {}

    def taken_over() -> BaseException:
        while step and f"checkpoint at step {step}\n" not in run.log_file.read_text():
            time.sleep(0.01)  # it was written behind the training's back, and in time
        leased(run, parent(), attempt=9)
        before.update(tree(run))
        return AssertionError("never raised")

    with overtaken(taken_over, step):
        said = house.fluxrun("queue", lora(house, every="every = 1"))
    assert said.code == 3
    assert said.err.endswith("a: not run: runs/a: attempt 9 has begun, this is attempt 1; nothing was written\n")
    after = tree(run)
    assert {path for path in after if path not in before} == set()
    changed = {path for path in before if after.get(path) != before[path]}
    assert changed <= {"run.log"}, changed
    assert run.lease().attempt == 9
    run.lease_file.unlink()
    go_on(house, "a.toml")
    unbroken(house, house.folder / "a.toml")
    assert_same(house)


def tree(run: Run) -> dict[str, bytes]:
    return {
        path.relative_to(run.folder).as_posix(): path.read_bytes() for path in run.folder.rglob("*") if path.is_file()
    }


def overtaken(then: Any, at: int) -> Any:
    """Calls `then` in the objective of that step, which goes on."""
    done: list[int] = []

    def when(_: str, step: int, *__: int) -> bool:
        if step == at and not done:
            done.append(step)
            then()
        return False

    return failing(lambda: AssertionError(), when)


def test_an_attempt_that_is_over_before_it_begins(house: House) -> None:
    from runner.core.errors import ExitCode
    from runner.core.signals import StopRequest
    from runner.engine.worker_main import TrainRequest, WorkerState, train_run

    job = job_of(house)
    claim_run(job.run, job.spec, job.plan, "0")
    job.run.next_attempt()
    before = tree(job.run)
    told: list[Any] = []
    assert (
        train_run(TrainRequest(job.run.folder, 1), "cpu", told.append, StopRequest(), WorkerState()) == ExitCode.LOCKED
    )
    assert told[-1]["reason"] == f"{job.run.folder}: attempt 2 has begun, this is attempt 1; nothing was written"
    assert tree(job.run) == before


@pytest.mark.parametrize("kept", range(6))
def test_a_queue_that_dies_while_it_enlists(house: House, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """After so many of the four files that it writes; the same command goes on, as if nothing had been there."""
    job, write, written = job_of(house), files.write_bytes, list[Path]()

    def dying(path: Path, *arguments: Any, **named: Any) -> None:
        if len(written) == kept:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", dying)
        for _ in range(2 if kept < 4 else 1):  # dies once more at the same place
            written.clear()
            try:
                claim_run(job.run, job.spec, job.plan, "0")
            except KeyboardInterrupt:
                assert kept < 4
    [again] = prepare_jobs([house.folder / "a.toml"], house.folder / "runs", fetch=False, fresh=False)
    assert again.status.state == ("resume" if kept > 1 else "new")
    assert claim_run(again.run, again.spec, again.plan, "0") > 0


def test_racing_commands_make_one_worker(house: House) -> None:
    """Real processes: one trains, the others name it and leave; the run is as if there had been one."""
    spec = lora(house)
    unbroken(house, spec)
    racers = [house.start("queue", spec, "--gpus", "cpu", "--no-check") for _ in range(6)]
    told = {racer.pid: (*racer.communicate(), racer.returncode) for racer in racers}
    [winner] = [pid for pid, (_, __, code) in told.items() if code == 0]
    for pid, (_, err, code) in told.items():
        if pid != winner:
            assert (code, err) == (3, f"a: not run: process {winner} is working on runs/a; wait for it, or stop it\n")
    assert json.loads((house.folder / "runs" / "a" / "state.json").read_text())["attempts"] == 1
    assert_same(house)
