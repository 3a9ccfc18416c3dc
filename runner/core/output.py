"""Keeps a command going when its output can no longer be written: a closed pipe, a lost terminal, a full disk under a
log."""

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
CLOSED_PIPE = 141  # 128 + SIGPIPE: the exit code that a shell reports for any program that a closed pipe ends


@contextmanager
def ignore_lost_output() -> Iterator[None]:
    """Drop output that cannot be written: to stdout if its reader is gone, to stderr also if its disk is full or
    failing."""
    _occupy_standard_files()
    originals = sys.stdout, sys.stderr
    sys.stdout = _tolerant(sys.stdout, LOST_READER_ERRNOS)
    sys.stderr = _tolerant(sys.stderr, LOST_READER_ERRNOS | DISK_ERRNOS)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = originals


def exit_code_of_closed_pipe() -> int:
    """The exit code of a command whose output was not read to the end. Discards what is still buffered."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # not a file of the system, see `_tolerant`
            os.dup2(devnull, stream.fileno())
    os.close(devnull)
    return CLOSED_PIPE


def _tolerant(stream: Any, ignored: set[int]) -> Any:
    """The same file, without the errors whose numbers are in `ignored`. A stream that is not a file of the system (a
    test's, or None for a closed one) is returned as it is."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return stream
    with suppress(OSError):
        stream.flush()
    buffer = io.BufferedWriter(_TolerantFile(number, ignored))
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)


class _TolerantFile(io.FileIO):
    def __init__(self, number: int, ignored: set[int]) -> None:
        super().__init__(number, "w", closefd=False)
        self.ignored = ignored

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self.ignored:
                raise
            return memoryview(data).nbytes


def _occupy_standard_files() -> None:
    """Open closed standard files on /dev/null.

    Otherwise the next file that is opened gets the number of the closed one, and what a library prints goes into it:
    for example into a checkpoint.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
