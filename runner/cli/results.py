"""What runs came to: `fluxrun results`, `compare`, `report` and `board`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from runner.cli.json_output import echo_json
from runner.cli.options import existing_runs_option, json_option


@click.command()
@existing_runs_option
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV to stdout, with a column for every spec key.")
@click.option("--sort", default="name", show_default=True, metavar="KEY", help="Column or spec key to sort by.")
def results(runs: Path, as_json: bool, as_csv: bool, sort: str) -> None:
    """Print all runs as a table: their results, and the spec keys in which they differ."""
    from runner.runs import index

    records = index.results(runs)
    columns = [name for name in index.Record.__dataclass_fields__ if name not in ("spec", "origins")]
    if sort not in {*columns, *(key for record in records for key in record.spec)}:
        raise click.BadParameter(
            f"{sort!r} is neither a column nor a key of these specs; columns are {', '.join(columns)}",
            param_hint="--sort",
        )
    records = index.sort_records(records, sort)
    if as_csv:
        click.echo(index.as_csv(records), nl=False)
    elif as_json:
        echo_json([asdict(record) for record in records])
    else:
        from runner.report.run_tables import results_table
        from runner.report.tables import console, print_parts
        from runner.runs.spec_differences import distinguishing_keys

        screen = console()
        print_parts(screen, results_table(records, distinguishing_keys(records), screen.width))


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@existing_runs_option
@json_option
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="PNG file for the runs' last pictures.")
def compare(names: tuple[str, ...], runs: Path, as_json: bool, out: Path | None) -> None:
    """Compare runs: the spec keys that differ, results, held-out loss by noise level, pictures."""
    from runner.report import compare as comparison
    from runner.report.tables import console, print_parts

    document = comparison.compare(runs, names)
    if out is not None:
        comparison.write_sheet(runs, names, out)
    if as_json:
        echo_json(document)
    else:
        screen = console()
        print_parts(screen, comparison.as_tables(document, screen.width))
    if out is not None:
        click.echo(str(out), err=True)


@click.command()
@existing_runs_option
def report(runs: Path) -> None:
    """Write the results page, RUNS/index.html, which opens without a network."""
    from runner.report.page import write_report

    click.echo(write_report(runs))


@click.command()
@existing_runs_option
@click.option("--port", default=6006, show_default=True, help="Port of the server.")
@click.pass_context
def board(ctx: click.Context, runs: Path, port: int) -> None:
    """Start TensorBoard on the runs folder, until Ctrl-C."""
    import subprocess

    from runner.tracking.hparams import write_sessions

    write_sessions(runs)
    command = [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(port)]
    with subprocess.Popen(command) as server:
        try:
            code = server.wait()
        except KeyboardInterrupt:  # Ctrl-C is how a user ends it
            server.terminate()
            code = 0
    ctx.exit(code)
