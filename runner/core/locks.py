"""Locks on files, which die with the process that holds them."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.core.errors import LockHeldError
from runner.core.files import ignore_disk_errors


@contextmanager
def hold_lock(path: Path, patience: float = 1.0, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock, which dies with this process; a second holder is refused (Held) with the first one's pid.

    `patience` seconds are waited, since `is_locked` holds the lock for an instant too; `waiting` is called meanwhile.
    """
    deadline = time.monotonic() + patience
    while (handle := acquire_lock(path)) is None:
        if time.monotonic() > deadline:
            who = lock_holder(path) or "unknown"
            raise LockHeldError(f"{path.parent}: process {who} is working on it; wait for it, or stop it")
        waiting()
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(handle)


def acquire_lock(path: Path) -> int | None:
    """A handle that holds the lock until it is closed, or this process dies; None where another process holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    if not _try_lock(handle):
        os.close(handle)
        return None
    with ignore_disk_errors():  # for the lock there always is; only its holder may stay nameless
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def lock_holder(path: Path) -> int | None:
    """The pid of the process that holds the lock, where it could write that down."""
    if not is_locked(path):
        return None
    text = path.read_text(errors="replace").strip()
    return int(text) if text.isdecimal() else None


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock now."""
    if not path.is_file():
        return False
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return not _try_lock(handle)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
