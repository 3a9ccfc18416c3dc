"""kill -9 at every operation of every save.

A forked child saves five steps with pruning, on a disk that kills its process before its N-th operation, with half of
it done (a write), or after the last one, for every N; so the child dies at the first, the middle and the last save
alike. Then the real loader must find the last acknowledged step (the writer's log said so) or a later whole one, what
was left aside is swept, and the next save works. The slow half does the same from outside, by strace at every system
call, in a real process.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import set_num_threads

from runner.checkpoint.storage import Checkpoint
from runner.checkpoint.writer import Writer
from runner.core import files
from runner.core.errors import BadFileError
from runner.runs.checkpoint_files import checkpoint_name, checkpoint_steps
from runner.runs.run import Run
from tests.support import unsafe_writers
from tests.support.checkpoints import STEPS, acknowledged, made, new_run, newest, whole, writer
from tests.support.deadly_disk import Deadly
from tests.support.paths import PROJECT

WRITER = PROJECT / "tests" / "support" / "torchless_writer.py"


def save_all(run: Run, keep: int, disk: files.Disk, kind: type[Writer] = Writer) -> None:
    """Five saves; what is acknowledged goes into a file that outlives this process."""
    with (run.folder / "said").open("ab", buffering=0) as said:

        def log(line: str) -> None:
            said.write(f"{line}\n".encode())

        saving = writer(run, keep=keep, disk=disk, kind=kind, log=log)
        for step in STEPS:
            saving.write(made(step))


def killed(work: Callable[[], None]) -> bool:
    """Do it in a forked child. True where that died by its own hand."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            set_num_threads(1)  # the threads of the pool did not come along
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == -signal.SIGKILL


def last_said(run: Run) -> int:
    said = run.folder / "said"
    return max(map(acknowledged, said.read_text().splitlines()), default=0) if said.exists() else 0


Load = Callable[[Run], Checkpoint | None]


def faults(run: Run, load: Load) -> tuple[int, int]:
    """(lost, wrong): whether what was acknowledged is gone, and whether what is found is not what was saved."""
    try:
        found = load(run)
    except (BadFileError, ValueError):
        return 0, 1
    if found is None:
        return int(last_said(run) > 0), 0
    return int(found.step < last_said(run)), int(not whole(found))


def kill_everywhere(
    keep: int, around: Callable[[files.Disk], files.Disk] = lambda disk: disk, kind: type[Writer] = Writer,
    load: Load = newest, moments: tuple[str, ...] = ("before", "half"),
) -> tuple[int, int, int]:  # fmt: skip
    """(cases, lost, wrong)"""
    counting = Deadly()
    run = new_run()
    save_all(run, keep, around(counting), kind)
    shutil.rmtree(run.runs)
    cases = lost = wrong = 0
    for at, name in enumerate(counting.log, 1):
        for moment in [*moments, *(["after"] if at == len(counting.log) else [])]:  # else "before" the one behind it
            if moment == "half" and name != "write":
                continue
            run = new_run()
            assert killed(lambda: save_all(run, keep, around(Deadly(at, moment)), kind)), (at, moment)  # noqa: B023
            gone, bad = faults(run, load)
            cases, lost, wrong = cases + 1, lost + gone, wrong + bad
            if kind is Writer and load is newest:
                the_next_save_works(run, keep)
            shutil.rmtree(run.runs)
    return cases, lost, wrong


def the_next_save_works(run: Run, keep: int) -> None:
    files.remove_partial_files(run.checkpoints)
    assert {path for _, path in checkpoint_steps(run.checkpoints)} == set(run.checkpoints.iterdir())
    found = newest(run)
    step = found.step + 10 if found else STEPS[0]
    writer(run, keep=keep).write(made(step))
    after = newest(run)
    assert after is not None
    assert (after.step, whole(after)) == (step, True)


@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_every_operation(keep: int) -> None:
    cases, lost, wrong = kill_everywhere(keep)
    print(f"kill, keep={keep}: {cases} cases, {lost} lost, {wrong} wrong")
    assert cases > 80
    assert (lost, wrong) == (0, 0)


def test_the_method_catches_pruning_first() -> None:
    cases, lost, _ = kill_everywhere(1, kind=unsafe_writers.PrunesFirst, moments=("before",))
    print(f"kill, control prunes first: {lost} of {cases} lost")
    assert lost > cases // 2


def test_the_method_catches_speaking_first() -> None:
    cases, lost, _ = kill_everywhere(1, kind=unsafe_writers.SpeaksFirst, moments=("before",))
    print(f"kill, control speaks first: {lost} of {cases} lost")
    assert lost > cases // 2


def test_the_method_catches_writing_in_place() -> None:
    """Together with a loader that believes the highest number; ours would go one step back."""
    cases, _, wrong = kill_everywhere(1, unsafe_writers.InPlace, load=unsafe_writers.highest, moments=("before",))
    print(f"kill, control in place and unverified: {wrong} of {cases} wrong")
    assert wrong > cases // 2


def test_a_failed_prune_is_said_and_kills_nothing() -> None:
    class Undeletable(files.Disk):
        def unlink(self, path: Path) -> None:
            raise PermissionError(1, "Operation not permitted", str(path))

    said: list[str] = []
    run = new_run()
    saving = writer(run, disk=Undeletable(), log=said.append)
    for step in (30, 40):
        saving.write(made(step))
    assert said[1].startswith("step-000030.safetensors: this old checkpoint cannot be removed ([Errno 1]")
    assert [acknowledged(line) for line in said] == [30, 0, 40]
    found = newest(run)
    assert found is not None
    assert found.step == 40


# ---- from outside --------------------------------------------------------------------------------------------------


def torchless(run: Run, *how: str, before: list[str] | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [*(before or []), os.path.realpath(sys.executable), "-S", str(WRITER), str(run.checkpoints), *how]
    with (run.folder / "said").open("wb") as said:
        return subprocess.run(command, stdout=said, env={"PYTHONPATH": str(PROJECT)}, check=False)


def test_the_torchless_writer_does_what_the_writer_does() -> None:
    """The same operations in the same order, and the same bytes."""
    run, other = new_run(), new_run()
    counting = Deadly()
    save_all(run, 1, counting)
    done = torchless(other, "tell")
    assert done.returncode == 0
    lines = (other.folder / "said").read_text().splitlines()
    assert [line for line in lines if line.isidentifier()] == counting.log
    assert [line for line in lines if acknowledged(line)] == (run.folder / "said").read_text().splitlines()
    assert [path.name for _, path in checkpoint_steps(other.checkpoints)] == [checkpoint_name(50), checkpoint_name(20)]
    for _, path in checkpoint_steps(run.checkpoints):
        assert path.read_bytes() == (other.checkpoints / path.name).read_bytes()


CALLS = ("openat", "write", "fsync", "rename", "unlink")


def calls_of(run: Run, call: str, how: tuple[str, ...]) -> range:
    """Which calls of this kind the saves make, counted over the whole process; those before are Python's start."""
    trace = run.folder / "trace"
    torchless(run, *how, before=["strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={call},mkdir"])
    lines = trace.read_text().splitlines()
    start, stop = (next(i for i, line in enumerate(lines) if f"/{name}" in line and " mkdir(" in line) for name in "<>")
    ours = [i for i, line in enumerate(lines) if re.search(rf" {call}\(", line)]
    return range(sum(i < start for i in ours) + 1, sum(i < stop for i in ours) + 1)


def kill_from_outside(call: str, *how: str) -> tuple[int, int]:
    """(cases, faults) over every one of these calls, each died on before it is made."""
    run = new_run()
    numbers = calls_of(run, call, how)
    shutil.rmtree(run.runs)
    bad = 0
    for number in numbers:
        run = new_run()
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]
        done = torchless(run, *how, before=["strace", "-f", "-qq", "-o", "/dev/null", *inject])
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), (call, number, done.returncode)
        bad += any(faults(run, newest))
        if not how:
            the_next_save_works(run, 1)
        shutil.rmtree(run.runs)
    return len(numbers), bad


def strace_works() -> str:
    """ "", or why not."""
    if not (found := shutil.which("strace")):
        return "no strace on this machine: kills at every system call are NOT tested (the injected ones are)"
    tried = subprocess.run([found, "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"strace may not trace here ({tried.stderr.strip()}): NOT tested"


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_killed_at_every_system_call(call: str) -> None:
    if why := strace_works():
        pytest.skip(why)
    cases, bad = kill_from_outside(call)
    print(f"strace, {call}: {cases} cases, {bad} lost or wrong")
    assert cases >= 3
    assert bad == 0


@pytest.mark.slow
def test_strace_catches_speaking_first() -> None:
    if why := strace_works():
        pytest.skip(why)
    cases, bad = kill_from_outside("fsync", "speak first")
    print(f"strace, control speaks first: {bad} of {cases} lost")
    assert bad >= cases // 2
