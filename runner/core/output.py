"""Output that nobody reads any more must not end a night: a closed pipe, a lost terminal, a full disk under a log. No torch."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from runner.core.errors import DISK_ERRNOS

LOST_READER_ERRNOS = {errno.EPIPE, errno.EIO, errno.ENXIO}  # a closed pipe; a terminal that is gone (tty_ioctl(4))
CLOSED_PIPE = 141  # 128 + SIGPIPE: what a shell sees of any program that a closed pipe ends


@contextmanager
def ignore_lost_output() -> Iterator[None]:
    """What is written to stdout and stderr here, and cannot be, is dropped, and the work goes on."""
    _occupy_standard_files()
    before = sys.stdout, sys.stderr
    sys.stdout = _tolerant(sys.stdout, LOST_READER_ERRNOS)
    sys.stderr = _tolerant(sys.stderr, LOST_READER_ERRNOS | DISK_ERRNOS)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _tolerant(stream: Any, dropped: set[int]) -> Any:
    """The same file, without errors of these numbers. A stream that is no file of the system's (a test's, a closed one, which
    is None) stays as it is."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return stream
    with suppress(OSError):
        stream.flush()
    buffer = io.BufferedWriter(_Tolerant(number, dropped))
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)


def exit_code_of_closed_pipe() -> int:
    """The exit code of a command whose output was not read to its end; nothing more is said."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # as above
            os.dup2(nothing, stream.fileno())  # what is still in its buffer goes there too
    os.close(nothing)
    return CLOSED_PIPE


class _Tolerant(io.FileIO):
    def __init__(self, number: int, dropped: set[int]) -> None:
        super().__init__(number, "w", closefd=False)
        self.dropped = dropped

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self.dropped:
                raise
            return memoryview(data).nbytes


def _occupy_standard_files() -> None:
    """Where stdin, stdout or stderr is closed, the next file that is opened gets its number, and what a library prints goes
    into a checkpoint: give the number to nothing instead."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
