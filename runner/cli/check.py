"""`fluxrun check`: print what can be known before a run starts."""

from __future__ import annotations

from pathlib import Path

import click

from runner.cli.json_output import echo_json
from runner.cli.options import json_option, runs_option, slots_option, specs_argument
from runner.core import output


@click.command()
@specs_argument
@runs_option
@json_option
@click.option("--gpus", help="As for `queue`: GPU numbers such as 0,1, or `cpu`. Default: all GPUs.")
@slots_option
@click.option("--step", is_flag=True, help="Also train 4 steps of each shape, and measure time and memory.")
@click.option("--allow-commands", is_flag=True, help="As for `queue`: specs may run their notify.command.")
@click.option("--fresh", is_flag=True, help="As for `queue`: a run folder made from another spec will be moved aside.")
@click.pass_context
def check(
    ctx: click.Context, specs: tuple[Path, ...], runs: Path, as_json: bool, gpus: str | None, slots: int, step: bool,
    allow_commands: bool, fresh: bool,
) -> None:  # fmt: skip
    """Check all that can be known before a run: specs, plan, every picture and caption, the files of the base, disk,
    memory, GPUs, logins and versions.

    `queue` does this first. The exit code is 2 if there is an error.
    """
    from runner.cli.diagnostics import echo_findings
    from runner.core.humanize import pluralize
    from runner.jobs.prepare import inspect_specs, notify_faults, planned_jobs
    from runner.preflight.check import check as check_jobs
    from runner.preflight.check import check_run_folders
    from runner.preflight.finding import LEVELS, in_order

    if step:  # training must not end because its output is not read
        ctx.with_resource(output.ignore_lost_output())
    seen, faults = inspect_specs(list(specs), runs, fetch=True, fresh=fresh)
    findings = check_jobs(seen, [*faults, *notify_faults(planned_jobs(seen), allow_commands)], runs, gpus, slots)
    findings = in_order([*findings, *check_run_folders(seen)])
    if step and not any(finding.level == "error" for finding in findings):
        from runner.preflight.trial import try_steps

        findings += try_steps(seen, gpus)
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    if as_json:
        names = [job.spec.name for job in seen]
        document = {"runs": names, "findings": [finding.as_json() for finding in findings], "counts": counts}
        echo_json(document)
    else:
        echo_findings(findings, err=False)
        summary = ", ".join(pluralize(count, level) for level, count in counts.items())
        click.echo(f"{pluralize(len(seen), 'run')}: {summary}")
    ctx.exit(2 if counts["error"] else 0)
