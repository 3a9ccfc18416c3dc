"""`fluxrun status`: what each run of a runs folder is doing."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.cli.json_output import echo_json
from runner.cli.options import complete_run_name, existing_runs_option, json_option

if TYPE_CHECKING:
    from runner.runs.state import RunState


@click.command()
@click.argument("names", nargs=-1, metavar="[RUN]...", shell_complete=complete_run_name)
@existing_runs_option
@json_option
@click.option("--watch", is_flag=True, help="Redraw every second until Ctrl-C.")
def status(names: tuple[str, ...], runs: Path, as_json: bool, watch: bool) -> None:
    """Show what each run is doing."""
    states = _states(runs, names)
    unknown = set(names) - states.keys()
    if unknown:
        raise click.BadParameter(f"no such run in {runs}: {', '.join(sorted(unknown))}", param_hint="RUN")
    if as_json:
        echo_json([{"steps": state.steps, **state.as_json(), "name": name} for name, state in states.items()])
        return
    from runner.report.run_tables import status_table
    from runner.report.tables import console, print_parts

    screen = console()
    if not watch:
        print_parts(screen, status_table(states, screen.width))
        return
    from rich.live import Live

    from runner.cli.watch import view

    with (
        suppress(KeyboardInterrupt),  # Ctrl-C is how a user ends it
        Live(view(runs, names, screen.width), console=screen, auto_refresh=False, vertical_overflow="visible") as live,
    ):
        while True:
            time.sleep(1)
            live.update(view(runs, names, screen.width), refresh=True)


def _states(runs: Path, names: tuple[str, ...]) -> dict[str, RunState]:
    """The state of each run, or of each named run, by its name."""
    from runner.runs.run import find_runs

    return {run.name: run.state() for run in find_runs(runs) if not names or run.name in names}
