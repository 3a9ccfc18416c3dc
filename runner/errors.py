"""Every way fluxrun can refuse or fail, and the exit code of each.

    FluxrunError                 1  a run failed; the message says what to do next
    ├── SpecError                2  faults of specs or of the command line; nothing was started
    ├── Interrupted              3  asked to stop (signal, deadline); the same command goes on
    ├── NonFinite                1  the loss or the gradients left the numbers
    ├── BadFile                  1  a checkpoint, cache entry or export that does not verify
    └── Refused                  1  the run folder is another run's, or another process works on it; it is untouched

Raised anywhere, printed in one place (`runner.cli`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class FluxrunError(Exception):
    exit_code = 1


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
        return "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
        )  # keys are the user's


class SpecError(FluxrunError):
    """All faults of all specs, found before anything starts."""

    exit_code = 2

    def __init__(self, faults: list[Fault] | tuple[Fault, ...]) -> None:
        self.faults = tuple(sorted(faults))
        super().__init__("\n".join(map(str, self.faults)))


class Interrupted(FluxrunError):
    exit_code = 3


class NonFinite(FluxrunError):
    pass


class BadFile(FluxrunError):
    pass


class Refused(FluxrunError):
    pass
