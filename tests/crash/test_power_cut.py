"""A real power cut: ext4 in a loop image, shut down by EXT4_IOC_SHUTDOWN without flushing its journal, so that only
what was synced is there after the next mount; then the real loader. Needs root and loop devices.

Journal commits by themselves are put off, and ext4's own help for careless writers (auto_da_alloc) is off: what
survives survives by the writer's syncs alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.checkpoint.storage import Checkpoint
from runner.core import files
from runner.core.errors import DiskError, ExitCode
from runner.engine.worker_main import classify_error
from runner.runs.run import Run
from tests.support import unsafe_writers
from tests.support.checkpoints import MEMORY, STEPS, Roomy, acknowledged, made, new_run, newest, whole, writer
from tests.support.deadly_disk import Deadly
from tests.support.mounts import tried

EXT4_IOC_SHUTDOWN = 2 << 30 | 4 << 16 | ord("X") << 8 | 125  # _IOR('X', 125, __u32)
NO_LOG_FLUSH = struct.pack("I", 2)


class Ext4:
    """A file system of its own, whose power can be cut."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(32 << 20)
        said = tried("mkfs.ext4", "-q", "-F", str(image)) or self.mount()
        if said:
            pytest.skip(f"no ext4 on a loop device here ({said}): real power cuts are NOT tested (the model's are)")

    def mount(self) -> str:
        return tried("mount", "-o", "loop,commit=600,noauto_da_alloc", str(self.image), str(self.folder))

    def cut_the_power(self) -> None:
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH)
        finally:
            os.close(handle)

    def start_again(self) -> None:
        assert not tried("umount", str(self.folder))
        assert not self.mount()


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Ext4]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount: real power cuts are NOT tested (the model's are)")
    image = (MEMORY if MEMORY.is_dir() else tmp_path) / f"fluxrun-power-cut-{os.getpid()}"
    try:
        yield Ext4(image, tmp_path / "disk")
    finally:
        if os.path.ismount(tmp_path / "disk") and tried("umount", str(tmp_path / "disk")):
            tried("umount", "-l", str(tmp_path / "disk"))
        image.unlink(missing_ok=True)


def test_what_was_acknowledged_survives_a_power_cut(ext4: Ext4) -> None:
    """The power goes right after each save's acknowledgement."""
    survived = cut_after_each_save(ext4)
    print(f"power cut after a save: {survived} of {len(STEPS)} survived")
    assert survived == len(STEPS)


@pytest.mark.parametrize("around", [unsafe_writers.NoSync, unsafe_writers.NoFileSync])
def test_a_power_cut_takes_what_was_not_synced(ext4: Ext4, around: type[unsafe_writers.Around]) -> None:
    survived = cut_after_each_save(ext4, around)
    print(f"power cut, control {around.__name__}: {survived} of {len(STEPS)} survived")
    assert survived == 0


def cut_after_each_save(ext4: Ext4, around: Callable[[files.Disk], files.Disk] = lambda disk: disk) -> int:
    """In how many of the cases the loader finds the step that was acknowledged last."""
    survived = 0
    for count in range(1, len(STEPS) + 1):
        run = synced(new_run(ext4.folder))
        said: list[int] = []
        saving = writer(run, disk=around(Roomy()), log=lambda line: said.append(acknowledged(line)))  # noqa: B023
        for step in STEPS[:count]:
            saving.write(made(step))
        assert said == list(STEPS[:count])
        ext4.cut_the_power()
        ext4.start_again()
        survived += good(newest(run), said)
        shutil.rmtree(run.runs)
    return survived


def test_the_power_may_go_at_any_operation(ext4: Ext4) -> None:
    """During the third save, which prunes: before and after each operation."""
    counting = Deadly()
    for step in STEPS[:3]:
        writer(new_run(ext4.folder), disk=counting).write(made(step))
    operations = len(counting.log) // 3 + 1  # and the unlink
    kept = dict.fromkeys(("the new one", "the old one"), 0)
    for at in range(1, operations + 1):
        for moment in ("before", "after"):
            run = synced(new_run(ext4.folder))
            said: list[int] = []
            disk = PowerCut(ext4, moment)
            saving = writer(run, disk=disk, log=lambda line: said.append(acknowledged(line)))  # noqa: B023
            for step in (10, 30):
                saving.write(made(step))
            disk.left = at
            ended = ExitCode.DONE
            try:
                saving.write(made(40))
            except (OSError, DiskError) as error:
                ended = classify_error(error)[0]
            assert ended is (ExitCode.DONE if at == operations else ExitCode.DISK)  # the last one is the unlink
            assert disk.left <= 0, "the power was not cut"
            ext4.start_again()
            found = newest(run)
            assert good(found, said), (at, moment, said, found)
            assert found is not None
            kept["the new one" if found.step == 40 else "the old one"] += 1
            shutil.rmtree(run.runs)
    print(f"power cut at {operations} operations, before and after: {kept}")
    assert all(kept.values())


class PowerCut(Deadly):
    """Cuts the power before or after the operation that is `left` operations away, and goes on as a process would."""

    def __init__(self, ext4: Ext4, when: str) -> None:
        super().__init__()
        self.ext4, self.when, self.left = ext4, when, 0

    def _do(self, name: str, operation: Callable[[], object], half: Callable[[], object] = lambda: None) -> object:
        self.left -= 1
        if self.left == 0 and self.when == "before":
            self.ext4.cut_the_power()
        try:
            return operation()
        finally:
            if self.left == 0 and self.when == "after":
                self.ext4.cut_the_power()


def synced(run: Run) -> Run:
    """The run's own folders are made durable by whoever makes them (`files.make_folder`)."""
    for folder in (run.checkpoints, run.folder, run.runs, run.runs.parent):
        files.DISK.sync_folder(folder)
    return run


def good(found: Checkpoint | None, said: list[int]) -> bool:
    return found is not None and whole(found) and found.step >= max(said)
