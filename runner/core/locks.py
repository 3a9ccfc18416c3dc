"""File locks, which the kernel releases when their process dies."""

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
def hold_lock(path: Path, timeout: float = 1.0, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock. Raises LockHeldError, with the holder's PID, where another process holds it.

    timeout: seconds to wait for it; some, since `is_locked` takes the lock for an instant, too. on_wait: called while
    waiting.
    """
    deadline = time.monotonic() + timeout
    while (handle := acquire_lock(path)) is None:
        if time.monotonic() > deadline:
            holder = lock_holder(path) or "unknown"
            raise LockHeldError(f"{path.parent}: process {holder} is working on it; wait for it, or stop it")
        on_wait()
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(handle)


def acquire_lock(path: Path) -> int | None:
    """A file handle that holds the lock until it is closed or this process dies; None where another process holds the
    lock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    if not _try_lock(handle):
        os.close(handle)
        return None
    with ignore_disk_errors():  # on a full disk the lock still works; only the holder's PID is missing
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def lock_holder(path: Path) -> int | None:
    """The PID of the process that holds the lock; None where nobody does, or the process could not write its PID."""
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
