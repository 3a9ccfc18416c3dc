"""Options and arguments that several commands share."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import click

from runner.core.command_line import DEFAULT_RUNS, RUNS_VARIABLE


def _usable_runs_folder(ctx: click.Context, _: click.Parameter, runs: Path) -> Path:
    """Refuse a path where no folder can be made. A command is refused, shell completion is not."""
    from runner.spec.run_names import LONGEST_RUNS_FOLDER

    if ctx.resilient_parsing:
        return runs
    length = len(os.fsencode(runs.absolute()))
    if length > LONGEST_RUNS_FOLDER:
        raise click.BadParameter(
            f"a path of {length:,} bytes; at most {LONGEST_RUNS_FOLDER:,} are allowed; name a folder nearer to the root"
        )
    nearest = next(path for path in (runs, *runs.absolute().parents) if os.path.exists(path) or path == path.parent)
    if not nearest.is_dir():
        raise click.BadParameter(f"{runs} cannot be made: {nearest} is a file; name another folder")
    return runs


def require_runs_folder(runs: Path) -> Path:
    """Return `runs`. Raises click.BadParameter if the folder does not exist."""
    if not runs.is_dir():
        raise click.BadParameter(
            f"there is no folder {str(runs)!r}; name the runs folder that `fluxrun queue` wrote to", param_hint="--runs"
        )
    return runs


def _existing_runs_folder(ctx: click.Context, param: click.Parameter, runs: Path) -> Path:
    return runs if ctx.resilient_parsing else require_runs_folder(_usable_runs_folder(ctx, param, runs))


_runs_option = partial(
    click.option, "--runs", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_RUNS, envvar=RUNS_VARIABLE,
    show_default=True, help="The runs folder.",
)  # fmt: skip
runs_option = _runs_option(callback=_usable_runs_folder)
existing_runs_option = _runs_option(callback=_existing_runs_folder)  # for commands that only read a runs folder

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")
gpu_option = click.option("--gpus", help="The number of a GPU, or `cpu`.")
slots_option = click.option(
    "--slots", type=click.IntRange(1, 64), default=1, show_default=True, help="Runs at the same time on a CPU."
)
specs_argument = click.argument("specs", nargs=-1, required=True, type=click.Path(path_type=Path))


def complete_run_name(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """For shell completion: the names of runs that begin with `incomplete`; [] if there is no runs folder."""
    from runner.runs.run import find_runs

    runs = Path(ctx.params.get("runs") or os.environ.get(RUNS_VARIABLE) or DEFAULT_RUNS)
    return [run.name for run in find_runs(runs) if run.name.startswith(incomplete)]
