"""The `fluxrun` commands that messages and the results page tell people to type."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

DEFAULT_RUNS = Path("runs")
RUNS_VARIABLE = "FLUXRUN_RUNS"


def fluxrun_command(*words: str | Path, runs: Path | None = None) -> str:
    """`fluxrun WORDS`, quoted for a shell, to be typed in the current folder.

    `runs`: the runs folder that the command is about. `--runs` is left out if the command would use that folder anyway.
    """
    is_default = runs is None or (runs == DEFAULT_RUNS and RUNS_VARIABLE not in os.environ)
    runs_option = [] if is_default else ["--runs", str(runs)]
    return shlex.join(["fluxrun", *map(str, words), *runs_option])
