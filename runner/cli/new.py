"""`fluxrun new` writes a spec to start from, `fluxrun schema` the JSON Schema that editors use."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from runner.core.command_line import fluxrun_command


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--from-command",
    "command",
    metavar="COMMAND",
    help="Translate a command line of train_dreambooth_lora_flux_advanced.py; - reads it from stdin.",
)
@click.option(
    "--template", type=click.Choice(["pivotal", "lora", "inversion"]), help="What to train. Default: pivotal."
)
@click.option("--short", is_flag=True, help="Only the keys that people change most.")
@click.option(
    "--card", metavar="GIB|auto", help="Settings that fit a card with this much memory, or (auto) the one in here."
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder to train on; sets source, captions, resolution and buckets to suit it.",
)
def new(
    file: Path, command: str | None, template: str | None, short: bool, card: str | None, pictures: Path | None
) -> None:
    """Write a commented spec to FILE, which must not exist yet, and its JSON Schema next to it."""
    from runner.core.files import output_folder, write_text
    from runner.newspec.file import NewSpecRequest, write_new_spec
    from runner.newspec.template import SCHEMA, NewError
    from runner.spec.json_schema import schema_text

    if file.exists():
        raise click.BadParameter(f"{file} exists; name another file", param_hint="FILE")
    options = (("--template", template), ("--short", short), ("--pictures", pictures))
    if command is not None and (given := [name for name, value in options if value]):
        raise click.UsageError(f"--from-command does not go with {', '.join(given)}: the command says what it trains")
    text = sys.stdin.read() if command == "-" else command
    try:
        spec = write_new_spec(NewSpecRequest(file, template or "pivotal", text, short, card, pictures))
    except NewError as error:
        raise click.BadParameter(str(error), param_hint=error.option) from None
    output_folder(file)
    write_text(file, spec.text)
    write_text(file.parent / SCHEMA, schema_text())
    for note in spec.notes:
        click.echo(f"{file}: {note}", err=True)
    click.echo(f"{file}: `{fluxrun_command('plan', file)}` checks it", err=True)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write. Default: stdout.")
def schema(out: Path | None) -> None:
    """Print the JSON Schema of a spec. With `#:schema ./FILE` as a spec's first line, editors complete its keys."""
    from runner.core.files import output_folder, write_text
    from runner.spec.json_schema import schema_text

    if out is None:
        click.echo(schema_text(), nl=False)
    else:
        output_folder(out)
        write_text(out, schema_text())
