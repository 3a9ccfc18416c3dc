"""The commands that messages and the results page tell people to type. No torch."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

DEFAULT_RUNS = Path("runs")
RUNS_VARIABLE = "FLUXRUN_RUNS"


def fluxrun_command(*words: str | Path, runs: Path | None = None) -> str:
    """`fluxrun WORDS` as a shell takes it, in the folder where fluxrun is typed now. `runs`: the runs folder it is about,
    which is named unless it is the one that a command takes by itself."""
    default = runs is None or (runs == DEFAULT_RUNS and RUNS_VARIABLE not in os.environ)
    where = [] if default else ["--runs", str(runs)]
    return shlex.join(["fluxrun", *map(str, words), *where])
