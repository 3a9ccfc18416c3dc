"""`fluxrun sample`: pictures from what a run exported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runner import device, export, files, flux, tokens
from runner.errors import FluxrunError
from runner.rundir import Run, read_spec
from runner.sample import sample, shots, size_of


def sample_run(
    runs: Path, name: str, prompts: Sequence[str], *, count: int, seed: int | None, steps: int | None, scale: float,
    gpus: str | None, out: Path | None,
) -> list[Path]:  # fmt: skip
    """Write the pictures and return their paths. Raises FluxrunError where the run has no exports or no prompt."""
    run = Run(runs, name)
    if not run.export.is_dir():
        raise FluxrunError(f"{run.export}: no exports; `fluxrun status` tells how far the run is")
    spec = read_spec(run.spec_file)
    chosen = tuple(prompts) or spec.validation.prompts
    if not chosen:
        raise FluxrunError("no prompt: give --prompt, or validate.prompts in the spec")
    first = spec.seed if seed is None else seed
    wanted = shots(chosen, count, first)
    placeholders = tokens.placeholders([(token.name, token.vectors, token.initializer) for token in spec.tokens])
    where = device.choose(gpus)
    device.prepare(where, tf32=spec.model.tf32)
    flux.quiet()
    model = spec.model
    base = flux.open_base(model.base, model.revision, model.variant, where, device.resolve_dtype(model.dtype, where))
    pictures = sample(
        base, export.exported_files(run.export, name, placeholders), wanted,
        length=model.max_sequence_length, steps=steps or spec.validation.steps,
        size=size_of(spec), scale=scale,
    )  # fmt: skip
    folder = files.make_folder(out or run.samples)
    written = []
    for number, (picture, (_, used)) in enumerate(zip(pictures, wanted, strict=True)):
        written.append(folder / f"sample-{number // count}-seed{used}.png")
        files.write_png(written[-1], picture)
    return written
