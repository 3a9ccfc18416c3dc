"""What the shell offers for a RUN. No torch."""

from __future__ import annotations

import os
from pathlib import Path

import click


def run_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The runs in the runs folder whose names begin so. A runs folder that is not there offers nothing."""
    del param
    from runner.runs.run import find_runs

    runs = Path(ctx.params.get("runs") or os.environ.get("FLUXRUN_RUNS") or "runs")
    return [run.name for run in find_runs(runs) if run.name.startswith(incomplete)]
