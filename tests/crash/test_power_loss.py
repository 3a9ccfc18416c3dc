"""Power loss, by a model of what a disk may keep.

The operations of five saves are logged, with all that was written. The power goes after every operation; then every
folder is built that a disk may show which keeps exactly what was synced and any part of the rest: of a file not synced
nothing, all, a part cut at 512 bytes, zeros, or any subset of its sectors; of the creates, renames and unlinks since
the folder's last sync any subset. In each the real loader must find the last acknowledged step or a later whole
one. No root, no real disk: it is stricter than any one file system.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

from runner.checkpoint.storage import Checkpoint
from runner.checkpoint.writer import Writer
from runner.core import files
from runner.core.errors import BadFileError
from runner.runs.run import Run
from tests.support import unsafe_writers
from tests.support.checkpoints import STEPS, acknowledged, made, new_run, newest, whole, writer

SECTOR = 512
ENOUGH = 50_000  # states, which a writer that syncs does not reach
PENDING = 8  # folder operations not synced at once, at most: all their subsets are tried


@dataclass
class Inode:
    data: bytes = b""
    synced: bytes = b""

    def after_a_power_cut(self, *, fine: bool) -> tuple[bytes, ...]:
        """What may be found in it. `fine`: with every subset of its sectors, or with some of them."""
        if self.data == self.synced:
            return (self.data,)
        length = len(self.data)
        cuts = range(0, length, SECTOR if fine else max(SECTOR, length // 2 // SECTOR * SECTOR))
        shorter = [self.data[:cut] for cut in cuts]
        torn = [one + bytes(length - len(one)) for one in shorter]
        sectors = [self.data[cut : cut + SECTOR] for cut in cuts] if fine else []
        patchy = [
            b"".join(one if there else bytes(len(one)) for one, there in zip(sectors, kept, strict=True))
            for kept in product((False, True), repeat=len(sectors))
        ]
        return tuple(dict.fromkeys([self.synced, self.data, *shorter, *torn, *patchy]))


Entries = dict[str, Inode]
Change = tuple[str | None, str | None, Inode | None]  # a name that goes, a name that comes, and what that leads to


@dataclass
class Power(files.Disk):
    """The real disk; after every operation `visit` is asked, with all states that a power cut there may leave.

    `free` and reading go to the real files, which are as they would be without a power cut.
    """

    visit: Callable[[Iterator[dict[str, bytes]]], None]
    durable: Entries = field(default_factory=dict)  # as of the folder's last sync
    now: Entries = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    open: dict[int, Inode] = field(default_factory=dict)

    def states(self) -> Iterator[dict[str, bytes]]:
        assert len(self.pending) <= PENDING
        for kept in product((False, True), repeat=len(self.pending)):
            entries = dict(self.durable)
            for keep, (gone, come, inode) in zip(kept, self.pending, strict=True):
                if keep:
                    entries.pop(gone or "", None)
                    if come is not None and inode is not None:
                        entries[come] = inode
            names = list(entries)
            fine = sum(inode.data != inode.synced for inode in entries.values()) == 1
            for contents in product(*(entries[name].after_a_power_cut(fine=fine) for name in names)):
                yield dict(zip(names, contents, strict=True))

    def create(self, path: Path) -> int:
        handle = files.DISK.create(path)
        self.open[handle] = self.now[path.name] = Inode()
        self.pending.append((None, path.name, self.open[handle]))
        self.visit(self.states())
        return handle

    def write(self, handle: int, data: bytes | memoryview) -> None:
        files.DISK.write(handle, data)
        self.open[handle].data += bytes(memoryview(data).cast("B"))
        self.visit(self.states())

    def sync(self, handle: int) -> None:
        self.open[handle].synced = self.open[handle].data
        self.visit(self.states())

    def close(self, handle: int) -> None:
        files.DISK.close(handle)
        del self.open[handle]

    def rename(self, old: Path, new: Path) -> None:
        files.DISK.rename(old, new)
        self.now[new.name] = self.now.pop(old.name)
        self.pending.append((old.name, new.name, self.now[new.name]))
        self.visit(self.states())

    def unlink(self, path: Path) -> None:
        files.DISK.unlink(path)
        if self.now.pop(path.name, None):
            self.pending.append((path.name, None, None))
        self.visit(self.states())

    def sync_folder(self, folder: Path) -> None:
        self.durable, self.pending = dict(self.now), []
        self.visit(self.states())


@dataclass
class Tally:
    states: int = 0
    loads: int = 0  # states that differ in what the loader looks at
    lost: int = 0
    wrong: int = 0


def cut_everywhere(
    keep: int, around: Callable[[files.Disk], files.Disk] = lambda disk: disk, kind: type[Writer] = Writer, saves: int = 5
) -> Tally:  # fmt: skip
    run, tally = new_run(), Tally()
    said = 0
    known: dict[frozenset[tuple[str, bytes]], Checkpoint | BadFileError | None] = {}

    def visit(states: Iterator[dict[str, bytes]]) -> None:
        for state in states:
            if tally.states == ENOUGH:
                return
            tally.states += 1
            looked_at = frozenset(
                (name, data) for name, data in state.items() if not name.endswith(files.PARTIAL_SUFFIX)
            )
            if looked_at not in known:
                known[looked_at] = loaded(state)
                tally.loads += 1
            found = known[looked_at]
            tally.wrong += isinstance(found, BadFileError) or (found is not None and not whole(found))
            tally.lost += said > (found.step if isinstance(found, Checkpoint) else 0)

    def log(line: str) -> None:
        nonlocal said
        said = max(said, acknowledged(line))
        visit(disk.states())

    disk = Power(visit)
    saving = writer(run, keep=keep, disk=around(disk), kind=kind, log=log)
    for step in STEPS[:saves]:
        saving.write(made(step))
    shutil.rmtree(run.runs)
    return tally


def loaded(state: dict[str, bytes]) -> Checkpoint | BadFileError | None:
    run: Run = new_run()
    for name, data in state.items():
        (run.checkpoints / name).write_bytes(data)
    try:
        return newest(run)
    except BadFileError as error:
        return error
    finally:
        shutil.rmtree(run.runs)


@pytest.mark.parametrize("keep", [1, 2])
def test_no_power_cut_takes_an_acknowledged_step(keep: int) -> None:
    tally = cut_everywhere(keep)
    print(f"power loss, keep={keep}: {tally}")
    assert 3000 < tally.states < ENOUGH
    assert (tally.lost, tally.wrong) == (0, 0)


@pytest.mark.parametrize("disk", [unsafe_writers.NoFileSync, unsafe_writers.NoFolderSync])
def test_the_method_catches_a_sync_left_out(disk: type[unsafe_writers.Around]) -> None:
    tally = cut_everywhere(1, disk, saves=3)
    print(f"power loss, control {disk.__name__}: {tally}")
    assert tally.lost > 100


@pytest.mark.parametrize(
    "kind", [unsafe_writers.PrunesTooEarly, unsafe_writers.PrunesFirst, unsafe_writers.SpeaksFirst]
)
def test_the_method_catches_a_wrong_order(kind: type[Writer]) -> None:
    tally = cut_everywhere(1, kind=kind)
    print(f"power loss, control {kind.__name__}: {tally}")
    assert tally.lost >= 4
