"""`fluxrun queue`: train a batch of specs; and `fluxrun _train`, the worker process that a queue starts for each
slot."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.cli.json_output import echo_json
from runner.cli.options import json_option, runs_option, slots_option, specs_argument
from runner.cli.plan import plan
from runner.core import output
from runner.core.errors import ExitCode, SpecError

if TYPE_CHECKING:
    from datetime import datetime

    from runner.engine.progress import Screen
    from runner.jobs.job import Job


@click.command()
@specs_argument
@runs_option
@json_option
@click.option("--gpus", help="GPU numbers such as 0,1 (one run on each), or `cpu`. Default: all GPUs.")
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Where runs execute."
)
@slots_option
@click.option(
    "--retries", type=click.IntRange(0), default=2, show_default=True, help="How often a crashed run is tried again."
)
@click.option("--stop-at", metavar="HH:MM", help="Save and stop at this time; the same command continues the queue.")
@click.option("--fail-fast", is_flag=True, help="Stop the queue at the first run that fails.")
@click.option("--allow-commands", is_flag=True, help="Allow specs to run their notify.command.")
@click.option("--dry-run", is_flag=True, help="Only print the plan, as `fluxrun plan` does.")
@click.option("--fresh", is_flag=True, help="If a run folder was made from another spec, move it aside and start anew.")
@click.option("--no-check", is_flag=True, help="Skip `fluxrun check`, which looks at pictures, base, disk and logins.")
@click.pass_context
def queue(
    ctx: click.Context, specs: tuple[Path, ...], runs: Path, as_json: bool, gpus: str | None, engine: str, slots: int,
    retries: int, stop_at: str | None, fail_fast: bool, allow_commands: bool, dry_run: bool, fresh: bool, no_check: bool,
) -> None:  # fmt: skip
    """Check and plan every spec, then train what is not done yet.

    SPECS are files, or folders (every *.toml in them). To continue after a stop, type the same command again.
    """
    if engine != "local":
        raise click.BadParameter(f"{engine!r} is not available yet; leave --engine out", param_hint="--engine")
    if dry_run:
        ctx.invoke(plan, specs=specs, runs=runs, as_json=as_json, gpus=gpus, fresh=fresh)
        return
    ctx.with_resource(output.ignore_lost_output())
    from runner.core.signals import StopRequest
    from runner.engine.progress import Screen
    from runner.engine.slot_filling import start_workers
    from runner.engine.slots import make_slots, on_gpus
    from runner.engine.supervisor import run_queue
    from runner.jobs import timing
    from runner.jobs.prepare import notify_faults, prepare_jobs

    with StopRequest(_deadline(stop_at), interrupt_on_second=False) as stop:
        jobs = prepare_jobs(list(specs), runs, fetch=True, fresh=fresh)
        if faults := notify_faults(jobs, allow_commands):
            raise SpecError(faults)
        try:
            slot_list = make_slots(gpus, slots, max((job.spec.compute.gpus for job in jobs), default=1), runs)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--gpus") from None
        screen = Screen()
        todo = _without_done(jobs, screen)
        with start_workers(slot_list, len(todo)) as workers:  # the workers import their libraries meanwhile
            if todo and not no_check and not _check_passes(todo, runs, gpus, slots):
                ctx.exit(2)
            for job in todo:
                if job.status.state == "changed":
                    screen.message(f"{job.plan.name}: the old run folder is now {job.run.archive()}")
            _make_runs_folder(runs)
            code = run_queue(todo, runs, slot_list, screen, stop, retries=retries, fail_fast=fail_fast, workers=workers)
        with suppress(OSError):  # the runs folder, which the times are read from, may be gone
            timing.remember_timing(todo, on_gpu=on_gpus(slot_list))
    if as_json:
        _print_records(runs, {job.plan.name for job in jobs})
    ctx.exit(code)


def _deadline(stop_at: str | None) -> datetime | None:
    """The next moment at which the clock shows `stop_at`; None without --stop-at."""
    from runner.core.signals import next_time

    try:
        return next_time(stop_at) if stop_at else None
    except ValueError:
        raise click.BadParameter(f"{stop_at!r} is not a time of day; write HH:MM", param_hint="--stop-at") from None


def _without_done(jobs: Sequence[Job], screen: Screen) -> list[Job]:
    """The jobs that are left to run; prints a line for each one that is done."""
    todo = []
    for job in jobs:
        if job.is_done:
            screen.message(f"{job.plan.name}: skipped, done ({job.status.reason})")
        else:
            todo.append(job)
    return todo


def _check_passes(jobs: Sequence[Job], runs: Path, gpus: str | None, slots: int) -> bool:
    """Run `fluxrun check`, print its warnings and errors to stderr, and return whether there was no error."""
    from runner.cli.diagnostics import echo_findings
    from runner.core.humanize import pluralize
    from runner.preflight.check import check

    findings = [finding for finding in check(jobs, (), runs, gpus, slots) if finding.level != "note"]
    errors = sum(finding.level == "error" for finding in findings)
    echo_findings(findings, err=True)
    if errors:
        click.echo(f"{pluralize(errors, 'error')}; nothing was started (--no-check starts anyway)", err=True)
    return errors == 0


def _make_runs_folder(runs: Path) -> None:
    from runner.core.files import make_folder

    try:
        make_folder(runs)
    except OSError as error:
        raise click.BadParameter(
            f"{runs} cannot be made ({error.strerror}); name another folder", param_hint="--runs"
        ) from None


def _print_records(runs: Path, names: set[str]) -> None:
    from runner.runs.index import results

    echo_json([asdict(record) for record in results(runs) if record.name in names])


@click.command("_train", hidden=True)
@click.option("--parent", type=int, help="Exit when this process ends.")
@click.option("--gpus", help="GPU numbers, or `cpu`.")
@click.pass_context
def train(ctx: click.Context, parent: int | None, gpus: str | None) -> None:
    """Train the runs that are named on stdin. A queue starts one such process for each slot."""
    from runner.core.process_identity import exit_with_parent
    from runner.core.signals import StopRequest

    if parent is not None:
        exit_with_parent(parent)
    code: int = ExitCode.STOPPED
    ctx.with_resource(output.ignore_lost_output())
    gc.disable()  # the imports create half a million objects that stay; `preload_libraries` enables it again
    with (
        StopRequest() as stop,
        suppress(KeyboardInterrupt),
    ):  # a second signal may arrive when the run has ended already
        from runner.engine.worker_main import main

        code = main(gpus, stop)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # all files are closed; tearing down the libraries would only delay the next run on this GPU
