"""Identities of processes that survive PID reuse and reboots, and ending with the parent process. Reads Linux'
/proc."""

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
PID_LIMIT = 2**31  # of kill(2), where 0 and negative numbers stand for process groups


@dataclass(frozen=True)
class Process:
    """A process, identified by more than its PID, which is used again: also by its start, in this boot of this host.

    boot: the kernel's random id of the boot. started: clock ticks after the boot; None where the system does not say.
    """

    host: str
    boot: str
    pid: int
    started: int | None

    @classmethod
    def current(cls) -> Process:
        return cls(platform.node(), _boot(), os.getpid(), _started(os.getpid()))

    @classmethod
    def from_json(cls, value: object) -> Process | None:
        """From `as_json`; None where `value` is something else."""
        match value:
            case {"host": str(host), "boot": str(boot), "pid": int(pid), "started": int() | None as started} if (
                0 < pid < PID_LIMIT
            ):
                return cls(host, boot, pid, started)
        return None

    def as_json(self) -> Mapping[str, Any]:
        return asdict(self)

    @property
    def is_local(self) -> bool:
        """Whether it is, or was, a process of this host. Only then `is_alive` is meaningful."""
        return self.host == platform.node()

    @property
    def is_alive(self) -> bool:
        """Whether this very process still runs, and not another one with its PID."""
        return self.boot == _boot() and _exists(self.pid) and _started(self.pid) == self.started


def exit_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent dies, however that happens. To be called early in the child.

    parent: the parent's PID. Raises ProcessLookupError where the parent is gone already.
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
    """Start in clock ticks after the boot; None for a zombie, which has ended, and where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the process's name, before it, may hold spaces and brackets
    return None if state in "ZX" else int(fields[18])  # field 22 of proc(5)
