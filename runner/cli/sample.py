"""`fluxrun sample`: draw pictures with the LoRAs that runs exported."""

from __future__ import annotations

from pathlib import Path

import click

from runner.cli.options import complete_run_name, existing_runs_option, gpu_option


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...", shell_complete=complete_run_name)
@existing_runs_option
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="With token names as in the spec; may be given several times. Default: the spec's prompts.",
)
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures per prompt.")
@click.option("--seed", type=int, help="Seed of the first picture; each further one adds 1. Default: the spec's.")
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps. Default: the spec's.")
@click.option("--scale", default=1.0, show_default=True, help="Strength of the LoRA.")
@gpu_option
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to write to. Default: each run's samples/."
)
def sample(
    names: tuple[str, ...], runs: Path, prompts: tuple[str, ...], count: int, seed: int | None, steps: int | None, scale: float,
    gpus: str | None, out: Path | None,
) -> None:  # fmt: skip
    """Draw pictures with the exports of runs, by stock diffusers.

    All runs get the same prompts and seeds. If there are several pictures, a contact sheet shows them together.
    """
    from runner.cli.sample_runs import sample_runs

    for path in sample_runs(runs, names, prompts, count=count, seed=seed, steps=steps, scale=scale, gpus=gpus, out=out):
        click.echo(path)
