"""`fluxrun stop`: ask queues, or single runs, to save and stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click

from runner.cli.options import complete_run_name, existing_runs_option
from runner.core.command_line import fluxrun_command
from runner.core.errors import FluxrunError


@click.command()
@click.argument("names", nargs=-1, metavar="[RUN]...", shell_complete=complete_run_name)
@existing_runs_option
def stop(names: tuple[str, ...], runs: Path) -> None:
    """Stop the named runs, or every queue on this runs folder. Each run saves at its next step; `queue` continues
    it."""
    for line in [_stop_run(runs, name) for name in names] if names else _stop_queues(runs):
        click.echo(line)


def _stop_run(runs: Path, name: str) -> str:
    """Stop one run, and return a line that says how. Its queue goes on with the next run.

    Raises FluxrunError if nothing on this machine works on the run.
    """
    from runner.core import locks
    from runner.runs.run import Run

    run = Run(runs, name)
    holder = run.holder() if run.folder.is_dir() else None
    if holder is None:
        status = fluxrun_command("status", runs=runs)
        raise FluxrunError(f"{run.folder}: nothing is working on it; `{status}` shows what each run is doing")
    if not holder.is_local:
        raise FluxrunError(f"{run.folder}: process {holder.pid} on {holder.host} works on it; stop it there")
    worker = locks.lock_holder(run.lock_file)
    if worker is None:
        run.request_stop()
        return f"{name}: will not be started"
    os.kill(worker, signal.SIGTERM)
    return f"{name}: saves at its next step and stops (process {worker})"


def _stop_queues(runs: Path) -> list[str]:
    """Stop every queue of this machine that holds a run in `runs`. Returns a line for each. Raises FluxrunError if
    there is none."""
    from runner.runs.run import find_runs

    holders = {holder.pid: holder for run in find_runs(runs) if (holder := run.holder()) and holder.is_local}
    if not holders:
        raise FluxrunError(f"{runs}: no queue is working on it")
    for pid in holders:
        os.kill(pid, signal.SIGTERM)
    return [f"queue of process {pid}: its runs save at their next step and stop" for pid in holders]
