"""What nobody foresaw, in one line for the user and whole in a file for whoever mends it. No torch."""

from __future__ import annotations

import os
import time
import traceback
from contextlib import suppress
from pathlib import Path

LONGEST = 1 << 20  # bytes of the file, then it begins anew


def traceback_file() -> Path:
    """In the user's cache folder, since a check writes nothing into the runs folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fluxrun" / "errors.log"


def summary_line(error: BaseException) -> str:
    """The error in one line, and where its traceback is kept."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    with suppress(OSError):  # where it cannot be kept the line must do
        path = traceback_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = "w" if path.is_file() and path.stat().st_size > LONGEST else "a"
        with path.open(mode, encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{''.join(traceback.format_exception(error))}\n")
        return f"{line} ({path} has the traceback)"
    return line
