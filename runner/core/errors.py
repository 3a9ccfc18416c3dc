"""Every way fluxrun can refuse or fail, with the exit code of the command and that of the worker process (`ExitCode`).

    FluxrunError                 1  FAILED     a run failed; the message says what to do next
    ├── SpecError                2  BAD_SPEC   faults of specs or of the command line; nothing was started
    ├── InterruptedRunError      3  STOPPED    asked to stop (signal, deadline); the same command goes on
    ├── DiskError                3  DISK       the disk is full or failing; the same command goes on once it is not
    ├── LockHeldError            3  LOCKED     another process works on the run; the run is not touched
    ├── UnreachableError         1  UNREACHABLE  the hub does not answer; a later try may succeed
    ├── RunMismatchError         1  FAILED     the run folder holds another run, which is not touched
    ├── NonFiniteError           1  NOT_FINITE the loss or the gradients are NaN or infinite; another try would end the same way
    └── BadFileError             1  FAILED     a checkpoint, cache entry or export that does not verify
    torch's and Python's own     1  MEMORY     out of memory, of the device or the machine
    anything else                1  CRASHED    unexpected, so another try may succeed

They may be raised anywhere. `runner.cli` prints them, and nothing else does.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from runner.core.humanize import escape_unprintable


class ExitCode(IntEnum):
    """How a worker process ends; `runner.engine.outcomes` decides what follows. The numbers are from sysexits.h where
    it has one."""

    DONE = 0
    CRASHED = 1
    UNREACHABLE = 68
    FAILED = 69  # for a known reason; another try would fail the same way
    LOCKED = 70
    MEMORY = 71
    DISK = 74
    STOPPED = 75
    NOT_FINITE = 65
    BAD_SPEC = 78


class FluxrunError(Exception):
    """An error with a message for the user. exit_code: of the command; code: of a worker process."""

    exit_code = 1
    code = ExitCode.FAILED


@dataclass(frozen=True, order=True)
class Fault:
    """One thing wrong with one key of one file; prints as `FILE:LINE: KEY: message`."""

    file: Path
    line: int
    key: str
    message: str

    def __str__(self) -> str:
        key = f"{self.key}: " if self.key else ""
        text = f"{self.file}:{self.line}: {key}{self.message}"
        # Keys and values come from the user's file and may hold control characters.
        return escape_unprintable(text)


class SpecError(FluxrunError):
    """All faults of all specs, found before any run starts."""

    exit_code = 2
    code = ExitCode.BAD_SPEC

    def __init__(self, faults: list[Fault] | tuple[Fault, ...]) -> None:
        self.faults = tuple(sorted(faults))
        super().__init__("\n".join(map(str, self.faults)))


class InterruptedRunError(FluxrunError):
    """A run was asked to stop, and has saved."""

    exit_code = 3
    code = ExitCode.STOPPED


class DiskError(FluxrunError):
    """The disk is full, failing or gone."""

    exit_code = 3
    code = ExitCode.DISK


class LockHeldError(FluxrunError):
    """Another process holds the lock or the lease."""

    exit_code = 3
    code = ExitCode.LOCKED


class UnreachableError(FluxrunError):
    """The hub does not answer."""

    code = ExitCode.UNREACHABLE


class RunMismatchError(FluxrunError):
    """A run folder does not hold the run that is asked for."""


class NonFiniteError(FluxrunError):
    """The loss or the gradients are NaN or infinite."""

    code = ExitCode.NOT_FINITE


class BadFileError(FluxrunError):
    """A file that cannot be read, or does not verify."""


DISK_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ESTALE,
    errno.ENOTCONN, errno.ENODEV, errno.ENXIO,
}  # fmt: skip


def is_disk_error(error: BaseException) -> bool:
    """Whether an error means that the disk is full, read-only, failing or away, rather than that the run is wrong."""
    return isinstance(error, OSError) and error.errno in DISK_ERRNOS
