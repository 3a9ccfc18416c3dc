"""`fluxrun plan`: what a queue would do. As tables on a terminal, as plain lines in a pipe, or as JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner.cli.json_output import echo_json
from runner.cli.options import json_option, runs_option, specs_argument
from runner.core.errors import SpecError

if TYPE_CHECKING:
    from runner.jobs.job import Job


@click.command()
@specs_argument
@runs_option
@json_option
@click.option("--gpus", help="`cpu` estimates memory for a CPU. Default: for a GPU.")
@click.pass_context
def plan(
    ctx: click.Context, specs: tuple[Path, ...], runs: Path, as_json: bool, gpus: str | None, fresh: bool = False
) -> None:
    """Check the specs and print the plan. Writes nothing, and needs neither a GPU nor torch."""
    on_gpu = gpus != "cpu"
    if as_json:
        errors = _print_json(specs, runs, on_gpu=on_gpu, fresh=fresh)
        ctx.exit(2 if errors else 0)
    elif sys.stdout.isatty():
        _print_tables(specs, runs, on_gpu=on_gpu, fresh=fresh)
    else:
        _print_lines(specs, runs, on_gpu=on_gpu, fresh=fresh)


def _queue_uses_gpu(on_gpu: bool) -> bool:
    """Whether a queue on this machine would train on a GPU. Times and cache entries are those of that device."""
    from runner.core import hardware

    return on_gpu and hardware.NVIDIA.is_dir()


def _print_tables(specs: Sequence[Path], runs: Path, *, on_gpu: bool, fresh: bool) -> None:
    """For a terminal. Raises SpecError for faulty specs, after the plan of the others is printed."""
    from runner.cli.plan_view import print_plan
    from runner.jobs import cache_hits, timing
    from runner.jobs.prepare import inspect_specs, planned_jobs
    from runner.report.tables import console

    seen, faults = inspect_specs(list(specs), runs, fetch=False, fresh=fresh)
    if jobs := planned_jobs(seen):
        gpu_here = _queue_uses_gpu(on_gpu)
        cached = cache_hits.lines(jobs, runs, on_gpu=gpu_here)
        times = timing.estimate_times(jobs, runs, on_gpu=gpu_here)
        print_plan(console(), jobs, times, cached, time.time(), on_gpu=on_gpu)
    if faults:
        raise SpecError(faults)


def _print_json(specs: Sequence[Path], runs: Path, *, on_gpu: bool, fresh: bool) -> int:
    """Returns the number of faults, which are part of the document. A faulty spec leaves `runs` empty."""
    from runner.jobs import cache_hits, card_fit, timing
    from runner.jobs.prepare import prepare_jobs
    from runner.plan import description

    jobs: list[Job] = []
    errors: list[dict[str, Any]] = []
    try:
        jobs = prepare_jobs(list(specs), runs, fetch=False, fresh=fresh)
    except SpecError as error:
        errors = [
            {"file": str(fault.file), "line": fault.line, "key": fault.key, "message": fault.message}
            for fault in error.faults
        ]
    estimates = card_fit.Estimates(on_gpu=on_gpu)
    gpu_here = _queue_uses_gpu(on_gpu)
    rows = [
        {
            **card_fit.with_memory(description.as_json(job.plan), job, estimates),
            "spec": str(job.file),
            "state": job.status.state,
            "reason": job.status.reason,
            "cache": cache_hits.as_json(hits),
            "time": estimate.as_json(),
        }
        for job, estimate, hits in zip(
            jobs,
            timing.estimate_times(jobs, runs, on_gpu=gpu_here),
            cache_hits.cache_hits_of(jobs, runs, on_gpu=gpu_here),
            strict=True,
        )
    ]
    echo_json({"runs": rows, "errors": errors})
    return len(errors)


def _print_lines(specs: Sequence[Path], runs: Path, *, on_gpu: bool, fresh: bool) -> None:
    """For a pipe or a file. Raises SpecError, with nothing printed, if any spec is faulty."""
    from runner.cli.plan_view import sizes_line, sweep_line
    from runner.core.humanize import pluralize
    from runner.jobs import cache_hits, card_fit
    from runner.jobs.prepare import prepare_jobs
    from runner.plan import description

    jobs = prepare_jobs(list(specs), runs, fetch=False, fresh=fresh)
    estimates = card_fit.Estimates(on_gpu=on_gpu)
    cached = cache_hits.lines(jobs, runs, on_gpu=_queue_uses_gpu(on_gpu))
    for job in jobs:
        click.echo(f"{job.plan.name}  ({job.file})  {job.status.state}: {job.status.reason}")
        if job.source.swept:
            click.echo(f"  {'sweep':<15}{sweep_line(job.source.swept)}")
        click.echo(f"  {'images':<15}{sizes_line(job.plan.sizes)}")
        for phase in job.plan.phases:
            click.echo("  " + _phase_line(description.describe(phase)))
        for line in card_fit.lines(job, estimates):
            click.echo(f"  {line}")
        if job.plan.name in cached:
            click.echo(f"  {cached[job.plan.name]}")
        for note in job.plan.notes:
            click.echo(f"  note: {note}")
    click.echo(f"{pluralize(len(jobs), 'run')}, {sum(job.plan.steps for job in jobs)} steps")


def _phase_line(facts: dict[str, Any]) -> str:
    """`facts`: a phase as `plan.description.describe` gives it."""
    span = f"steps {facts['start'] + 1}-{facts['stop']}" if facts["stop"] > facts["start"] else ""
    trains = ", ".join(
        f"{part['what']}{' in ' + '+'.join(part['encoders']) if 'encoders' in part else ''} "
        f"({_parameter_count(part['parameters'])} parameters)"
        for part in facts["trains"]
    )
    return f"{facts['name']:<15}{span:<16}{trains or 'trains nothing'}; on the device: {', '.join(facts['resident'])}"


def _parameter_count(count: int | None) -> str:
    return "an unknown number of" if count is None else f"{count:,}"
