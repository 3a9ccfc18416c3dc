"""`fluxrun export` writes a run's exports again; `fluxrun convert` changes the layout of a LoRA file."""

from __future__ import annotations

from pathlib import Path

import click

from runner.cli.options import complete_run_name, existing_runs_option, gpu_option
from runner.core import output


@click.command()
@click.argument("name", metavar="RUN", shell_complete=complete_run_name)
@existing_runs_option
@click.option("--step", type=click.IntRange(min=0), help="Export the checkpoint of this step. Default: the newest.")
@click.option("--push", is_flag=True, help="Also upload the files, as hub.repo and hub.private say.")
@gpu_option
@click.pass_context
def export(ctx: click.Context, name: str, runs: Path, step: int | None, push: bool, gpus: str | None) -> None:
    """Write the exports of RUN again, whatever state it is in."""
    ctx.with_resource(output.ignore_lost_output())
    from runner.cli.write_exports import write_exports
    from runner.core.events import EventLog
    from runner.engine.progress import Screen

    screen = Screen()
    event_log = EventLog(lambda event: screen.show("", event))
    for path in write_exports(runs, name, step, gpus=gpus, push_too=push, event_log=event_log):
        click.echo(path)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--to", type=click.Choice(["diffusers", "kohya"]), required=True, help="Layout to write.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write. Default: FILE's name and the layout."
)
@click.option("--leave-out", is_flag=True, help="Leave out a T5 LoRA, biases and norms, and convert the rest.")
def convert(file: Path, to: str, out: Path | None, leave_out: bool) -> None:
    """Convert a FLUX.1 LoRA to diffusers' layout, or to the original one (kohya, ComfyUI).

    Reads what kohya's sd-scripts, OneTrainer, ai-toolkit, x-flux, diffusers, ComfyUI and Black Forest Labs write.
    """
    from runner.export.convert import convert as convert_file

    converted = convert_file(file, to, out, leave_out=leave_out)
    for note in converted.notes:
        click.echo(f"{converted.file}: {note}", err=True)
    click.echo(
        f"{converted.file}: read back; the largest difference of a weight's change is {converted.error:.2g}", err=True
    )
    click.echo(converted.file)
