"""Unexpected errors: one line for the user, and the whole traceback in a file for a bug report."""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from pathlib import Path

from runner.core.user_cache import user_cache

MAX_BYTES = 1 << 20  # of the file; a longer one is started again


def traceback_file() -> Path:
    """In the user's cache folder, since `fluxrun check` writes nothing into the runs folder."""
    return user_cache() / "errors.log"


def summary_line(error: BaseException) -> str:
    """The error in one line, with the path of the file to which its traceback was appended."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    with suppress(OSError):  # without the file, the line has to do
        path = traceback_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = "w" if path.is_file() and path.stat().st_size > MAX_BYTES else "a"
        with path.open(mode, encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{''.join(traceback.format_exception(error))}\n")
        return f"{line} ({path} has the traceback)"
    return line
