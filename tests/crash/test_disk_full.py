"""A disk that is full or failing: a tmpfs without bytes or inodes, a file system on a thin image where only fsync
tells, a limit on the size of files, and each error at each operation of a save.

The attempt leaves no trace, the checkpoint before it stands, the end is classified as the disk's, and once there is
room the same save works.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.writer import Writer
from runner.core import files
from runner.core.errors import DiskError, ExitCode
from runner.engine.worker_main import classify_error
from runner.runs.run import Run
from tests.support import unsafe_writers
from tests.support.checkpoints import Roomy, acknowledged, content, made, new_run, newest, whole, writer
from tests.support.deadly_disk import Deadly
from tests.support.house import House
from tests.support.mounts import tried
from tests.support.runs import export_bytes

ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS]


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount something; it is taken down whatever happens."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount: full file systems are NOT tested (a limit on files and injected errors are)")
    made_here: list[Path] = []

    def mount(*options: str) -> Path:
        folder = tmp_path / f"mount-{len(made_here)}"
        folder.mkdir()
        if why := tried("mount", *options, str(folder)):
            pytest.skip(f"no mount here ({why}): full file systems are NOT tested (injected errors are)")
        made_here.append(folder)
        return folder

    try:
        yield mount
    finally:
        for folder in reversed(made_here):
            if os.path.ismount(folder) and tried("umount", str(folder)):
                tried("umount", "-l", str(folder))


def save_fails(saving: Writer, step: int, size: int = 900) -> tuple[ExitCode, str]:
    with pytest.raises((OSError, DiskError)) as raised:
        saving.write(made(step, size))
    return classify_error(raised.value)


def stands(run: Run, step: int, size: int = 900) -> bool:
    found = newest(run)
    return found is not None and found.step == step and whole(found, size)


@pytest.mark.parametrize("limit", ["size=64k", "nr_inodes=7"])
def test_a_full_tmpfs(mounts: Callable[..., Path], limit: str) -> None:
    disk = mounts("-t", "tmpfs", "-o", f"size=1m,{limit}", "tmpfs")
    run = new_run(disk)
    said: list[str] = []
    saving = writer(run, keep=9, disk=Roomy(), log=said.append)
    size = 5000
    last = {"size=64k": 20, "nr_inodes=7": 30}[limit]
    for step in range(10, last + 1, 10):
        saving.write(made(step, size))
    before = content(run.checkpoints)
    assert save_fails(saving, last + 10, size)[0] is ExitCode.DISK
    assert acknowledged(said[-1]) == last
    assert content(run.checkpoints) == before
    assert stands(run, last, size)
    assert not tried("mount", "-o", "remount,size=2m,nr_inodes=100", str(disk))
    saving.write(made(last + 10, size))
    assert stands(run, last + 10, size)


def thin(mounts: Callable[..., Path]) -> tuple[Path, Callable[[str], None], Callable[[], None]]:
    """A file system that believes to have 64 MiB, on 6; how to give it more; how to see what is really there."""
    below = mounts("-t", "tmpfs", "-o", "size=6m", "tmpfs")
    image = below / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    why = tried("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "nodiscard", "-N", "64", str(image))
    if why:
        pytest.skip(f"no ext4 here ({why}): the error that only fsync reports is NOT tested for real")
    disk = mounts("-o", "loop", str(image))

    def grow(size: str) -> None:
        assert not tried("mount", "-o", f"remount,size={size}", str(below))

    def again() -> None:
        assert not tried("umount", str(disk))
        assert not tried("mount", "-o", "loop", str(image), str(disk))

    return disk, grow, again


SIZE = 600_000  # 2.4 MB a checkpoint: the third does not fit


def test_an_error_that_only_fsync_reports(mounts: Callable[..., Path]) -> None:
    disk, grow, again = thin(mounts)
    run = new_run(disk)
    counting = Deadly()
    saving = writer(run, keep=9, disk=counting)
    for step in (10, 20):
        saving.write(made(step, SIZE))
    before = content(run.checkpoints)
    counting.log.clear()
    code, reason = save_fails(saving, 30, SIZE)
    assert counting.log == ["create", *["write"] * 6, "sync", "close", "unlink"]  # every write was said to be well
    assert (code, reason) == (ExitCode.DISK, "No space left on device; the checkpoint before it stands")
    assert content(run.checkpoints) == before
    grow("32m")
    saving.write(made(30, SIZE))
    again()
    assert stands(run, 30, SIZE)


def test_the_method_catches_a_swallowed_fsync_error(mounts: Callable[..., Path]) -> None:
    disk, grow, again = thin(mounts)
    run = new_run(disk)
    said: list[int] = []
    saving = writer(
        run,
        keep=9,
        disk=unsafe_writers.SwallowsSyncErrors(Roomy()),
        log=lambda line: said.append(acknowledged(line)),
        pivots=(),
    )
    for step in (10, 20, 30, 40):
        saving.write(made(step, SIZE))  # read back from memory, where all is well
    assert said[-1] == 40
    again()
    grow("32m")  # for the quarantine
    found = newest(run)
    print(f"disk full, control swallows fsync's errors: 40 acknowledged, {found.step if found else 'none'} found")
    assert found is None or found.step < 40


def test_a_limit_on_the_size_of_files() -> None:
    run = new_run()
    saving = writer(run)
    saving.write(made(10))
    before = content(run.checkpoints)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        code, reason = save_fails(saving, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, reason) == (ExitCode.DISK, "File too large; the checkpoint before it stands")
    assert content(run.checkpoints) == before
    saving.write(made(20))
    assert stands(run, 20)


class Failing(Deadly):
    """Operation `at` fails with `error`, a write with half of it done; `lasting`: and so do all after it but close."""

    def __init__(self, at: int, error: int, *, lasting: bool) -> None:
        super().__init__()
        self.at, self.error, self.lasting = at, error, lasting

    def _do(self, name: str, operation: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        self.done += 1
        self.log.append(name)
        if name != "close" and (self.done == self.at or (self.lasting and self.done > self.at)):
            half()
            raise OSError(self.error, os.strerror(self.error))
        return operation()


@pytest.mark.parametrize("lasting", [False, True])
def test_every_error_at_every_operation(lasting: bool) -> None:
    cases = 0
    for error in ERRORS:
        for at in range(1, 13):
            run = new_run()
            said: list[str] = []
            for step in (10, 30):
                writer(run, keep=1).write(made(step))
            before = content(run.checkpoints)
            disk = Failing(at, error, lasting=lasting)
            saving = writer(run, disk=disk, log=said.append)
            cases += 1
            name = ["create", *["write"] * 6, "sync", "close", "rename", "sync_folder", "unlink"][at - 1]
            if name == "unlink" or (name == "close" and not lasting):  # a file too many harms nothing
                saving.write(made(40))
                assert acknowledged(said[-1]) == 40
                assert stands(run, 40)
            else:
                code, reason = save_fails(saving, 40)
                assert (code, said) == (ExitCode.DISK, [])
                assert os.strerror(error) in reason
                after = content(run.checkpoints)
                if name == "sync_folder":  # it is there and whole, only not for sure
                    assert after.pop("step-000040.safetensors")
                if lasting:  # what cannot be removed is swept at the next start
                    files.remove_partial_files(run.checkpoints)
                    after = {one: data for one, data in after.items() if not one.endswith(files.PARTIAL_SUFFIX)}
                assert after == before
                assert stands(run, 40 if name == "sync_folder" else 30)
                writer(run).write(made(40))
            assert stands(run, 40)
            shutil.rmtree(run.runs)
    print(f"errors injected, lasting={lasting}: {cases} cases")
    assert cases == 48


def test_a_disk_that_gives_back_other_bytes_pauses_the_run() -> None:
    class Forgetful(files.Disk):
        def write(self, handle: int, data: bytes | memoryview) -> None:
            files.DISK.write(handle, bytes(data) if len(data) < 1000 else bytes(len(data)))

    run = new_run()
    said: list[str] = []
    writer(run).write(made(30))
    code, reason = save_fails(writer(run, disk=Forgetful(), log=said.append), 40, 3000)
    assert (code, said) == (ExitCode.DISK, [])
    assert "that is what came back right after writing, so the disk or the memory is failing" in reason
    assert stands(run, 30)


def test_no_room_is_told_in_numbers_before_a_byte_is_written() -> None:
    class Small(Deadly):
        room = 5 << 20

        def free(self, folder: Path) -> int:
            return self.room

    run, small = new_run(), Small()
    code, reason = save_fails(writer(run, disk=small), 40, 500_000)
    assert code is ExitCode.DISK
    assert reason == (
        f"no room for the checkpoint of step 40 in {run.checkpoints}: 5 MiB free, it needs 17; the checkpoint before "
        "it stands. Free some space, then the same command goes on"
    )
    assert not small.log
    small.room = 18 << 20
    writer(run, disk=small).write(made(40, 500_000))
    assert stands(run, 40, 500_000)


def test_a_full_disk_pauses_one_run_of_a_queue(house: House, done: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at step 4 of the first run, then before it goes on, then has room again."""
    specs = [house.spec("a"), house.spec("b", steps="steps = 1", prompts="prompts = []")]
    run = house.folder / "runs" / "a"
    create, free = files.DISK.create, files.DISK.free

    def full(path: Path) -> int:
        if "a/checkpoints/.step-000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return create(path)

    monkeypatch.setattr(files.DISK, "create", full)
    said = house.fluxrun("queue", *specs)
    assert said.code == 3, said.err
    assert "a: paused: No space left on device; the checkpoint before it stands" in said.err
    states = {row["name"]: row for row in json.loads(house.fluxrun("status", "--json").out)}
    assert (states["a"]["state"], states["b"]["state"]) == ("stopped", "done")
    assert states["a"]["error"] == "No space left on device; the checkpoint before it stands"
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-000002.safetensors",
        "step-000003.safetensors",
    ]

    monkeypatch.setattr(files.DISK, "create", create)
    monkeypatch.setattr(files.DISK, "free", lambda folder: 1 << 20)
    said = house.fluxrun("queue", *specs)
    assert said.code == 3, said.err
    assert (
        "a: paused: the run needs about 17 MiB, of which 16 MiB must stay free, and runs/a has room for 1 MiB; "
        in said.err
    )
    assert "resuming" not in said.err

    monkeypatch.setattr(files.DISK, "free", free)
    said = house.fluxrun("queue", *specs)
    assert said.code == 0, said.err
    assert "resuming at step 3 of 6" in said.err
    assert export_bytes(run) == export_bytes(done.folder / "runs" / "a")
