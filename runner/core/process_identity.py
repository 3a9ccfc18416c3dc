"""Who a process is, whether it still lives, and not outliving one's parent. Linux tells all of it in /proc."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PR_SET_PDEATHSIG = 1  # prctl(2)
MOST_PIDS = 2**31  # what kill(2) takes; 0 and less stand for whole groups


@dataclass(frozen=True)
class Process:
    """A process that no other can be taken for: a pid is used again, but not with this start on this boot of this host.

    `started`: clock ticks after the boot; None where the system does not tell.
    """

    host: str
    boot: str
    pid: int
    started: int | None

    @classmethod
    def own(cls) -> Process:
        return cls(platform.node(), _boot(), os.getpid(), _started(os.getpid()))

    @classmethod
    def read(cls, value: object) -> Process | None:
        """From JSON; None where it is no process's description."""
        match value:
            case {"host": str(host), "boot": str(boot), "pid": int(pid), "started": int() | None as started} if (
                0 < pid < MOST_PIDS
            ):
                return cls(host, boot, pid, started)
        return None

    def as_json(self) -> Mapping[str, Any]:
        return asdict(self)

    @property
    def here(self) -> bool:
        """Whether it is (or was) a process of this host, so that `lives` can tell."""
        return self.host == platform.node()

    @property
    def lives(self) -> bool:
        return self.boot == _boot() and _exists(self.pid) and _started(self.pid) == self.started


def exit_with_parent(parent: int) -> None:
    """Be killed when the parent dies, however it dies: no orphan trains on. To be called by the child, early.

    Raises ProcessLookupError where the parent is gone already.
    """
    if platform.system() == "Linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError(f"the process that started this one ({parent}) is gone")


def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _started(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if state in "ZX" else int(rest[18])  # field 22; a zombie no longer works on anything
