"""`fluxrun cache`: what the shared cache of a runs folder holds; `fluxrun cache prune` removes what was not used
lately."""

from __future__ import annotations

from pathlib import Path

import click

from runner.cli.json_output import echo_json
from runner.cli.options import json_option, require_runs_folder, runs_option


@click.group(invoke_without_command=True)
@runs_option
@json_option
@click.pass_context
def cache(ctx: click.Context, runs: Path, as_json: bool) -> None:
    """Show what the shared cache of latents and text embeddings holds."""
    ctx.obj = runs, as_json
    if ctx.invoked_subcommand is not None:
        return
    from runner.cli.cache_entries import kinds_as_json, kinds_table, list_kinds

    kinds = list_kinds(require_runs_folder(runs))
    if as_json:
        echo_json(kinds_as_json(kinds))
        return
    from runner.report.tables import console

    console().print(kinds_table(kinds))


@cache.command("prune")
@click.option(
    "--days", type=click.FloatRange(min=0), default=30, show_default=True, help="Keep what was used in so many days."
)
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), help="The runs folder.  [default: runs]")
@json_option
@click.pass_obj
def cache_prune(group_options: tuple[Path, bool], days: float, runs: Path | None, as_json: bool) -> None:
    """Remove entries that no run has used lately. A run that needs one computes it again."""
    from runner.cli.cache_entries import prune

    group_runs, group_json = group_options  # --runs and --json may also stand before `prune`
    entries, size = prune(require_runs_folder(runs or group_runs), days)
    if as_json or group_json:
        echo_json({"entries": entries, "bytes": size}, indent=None)
    else:
        click.echo(f"{entries:,} entries removed, {size / 2**20:,.1f} MiB")
