"""The command line: `main` is `fluxrun`, and each file here holds one of its commands, or a few that belong together.

A command imports what it needs inside its function, so that `fluxrun --help` and shell completion stay fast.
"""

from __future__ import annotations

import click

from runner.cli import cache, check, export, new, plan, queue, results, sample, status, stop
from runner.cli.group import FluxrunGroup


@click.group(cls=FluxrunGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fluxrun")
def main() -> None:
    """Queue FLUX LoRA and pivotal-tuning runs and let them run unattended."""


for command in (
    new.new, new.schema, check.check, plan.plan, queue.queue, queue.train, status.status, stop.stop, results.results,
    results.compare, results.report, results.board, sample.sample, export.export, export.convert, cache.cache,
):  # fmt: skip
    main.add_command(command)
