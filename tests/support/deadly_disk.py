"""A disk that kills its process at a chosen operation."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.core import files


class Deadly(files.Disk):
    """Kills its process at operation `at`: "before" it, "after" it, or with "half" of a write done. Without `at` it
    only counts."""

    def __init__(self, at: int = 0, moment: str = "") -> None:
        self.at, self.moment, self.done = at, moment, 0
        self.log: list[str] = []

    def _do(self, name: str, operation: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        self.done += 1
        self.log.append(name)
        if self.done != self.at:
            return operation()
        if self.moment == "half":
            half()
        elif self.moment == "after":
            operation()
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    def create(self, path: Path) -> int:
        handle: int = self._do("create", lambda: files.DISK.create(path))
        return handle

    def write(self, handle: int, data: bytes | memoryview) -> None:
        some = memoryview(data).cast("B")
        self._do(
            "write", lambda: files.DISK.write(handle, some), lambda: files.DISK.write(handle, some[: len(some) // 2])
        )

    def sync(self, handle: int) -> None:
        self._do("sync", lambda: files.DISK.sync(handle))

    def close(self, handle: int) -> None:
        self._do("close", lambda: files.DISK.close(handle))

    def rename(self, old: Path, new: Path) -> None:
        self._do("rename", lambda: files.DISK.rename(old, new))

    def unlink(self, path: Path) -> None:
        self._do("unlink", lambda: files.DISK.unlink(path))

    def sync_folder(self, folder: Path) -> None:
        self._do("sync_folder", lambda: files.DISK.sync_folder(folder))
