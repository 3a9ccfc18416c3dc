"""Draws pictures with the exports of runs: the work of `fluxrun sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from runner.core import contact_sheet, files
from runner.core.command_line import fluxrun_command
from runner.core.errors import FluxrunError
from runner.data import tokens
from runner.export import formats, pipeline
from runner.model import device, libraries
from runner.runs import sample_files
from runner.runs.run import Run
from runner.runs.spec_file import read_spec
from runner.spec.export_names import file_stem
from runner.spec.schema import Spec
from runner.training.context import open_base, open_cache

SHEET = "sample-sheet.png"


@dataclass(frozen=True)
class SampleRequest:
    """What to draw with every run. prompts: (prompt, seed) of each picture; size: of its sides, in pixels."""

    prompts: tuple[tuple[str, int], ...]
    steps: int
    size: int
    scale: float


def sample_runs(
    runs: Path, names: Sequence[str], prompts: Sequence[str], *, count: int, seed: int | None, steps: int | None,
    scale: float, gpus: str | None, out: Path | None,
) -> list[Path]:  # fmt: skip
    """Draw and write the pictures, and a contact sheet if there are several. Returns their paths, the sheet's last.

    Prompts, seed, steps and size default to those of the first run, for all runs, so that their pictures compare.
    Raises FluxrunError if a run has no exports, or if there is no prompt.
    """
    chosen = [_exported_run(Run(runs, name)) for name in dict.fromkeys(names)]
    if out is not None:
        files.output_folder(out / SHEET)  # refuse it before minutes of drawing
    first_run, spec = chosen[0]
    texts = tuple(prompts) or spec.validation.prompts
    if not texts:
        raise FluxrunError("no prompt: give --prompt, or validate.prompts in the spec")
    pairs = tuple(sample_files.samples_of(texts, count, spec.seed if seed is None else seed))
    request = SampleRequest(pairs, steps or spec.validation.steps, pipeline.size_of(spec), scale)
    target = device.choose_device(gpus)
    libraries.quiet()
    pictures, written = [], []
    for run, run_spec in chosen:
        device.prepare_device(target, tf32=run_spec.model.tf32)
        drawn = _draw(run, run_spec, request, target)
        device.release(target)
        pictures.append(drawn)
        folder = files.make_folder(out or run.samples)
        prefix = f"{file_stem(run.name)}-" if out and len(chosen) > 1 else ""
        for index, (picture, (_, picture_seed)) in enumerate(zip(drawn, pairs, strict=True)):
            written.append(folder / f"{prefix}sample-{index // count}-seed{picture_seed}.png")
            files.write_png(written[-1], picture)
    if len(written) > 1:
        written.append((out or first_run.samples) / SHEET)
        files.write_png(written[-1], _sheet([run.name for run, _ in chosen], pictures, request, count))
    return written


def _exported_run(run: Run) -> tuple[Run, Spec]:
    if not run.export.is_dir():
        status = fluxrun_command("status", runs=run.runs)
        raise FluxrunError(f"{run.export}: no exports; `{status}` shows how far the run is")
    return run, read_spec(run.spec_file)


def _draw(run: Run, spec: Spec, request: SampleRequest, target: torch.device) -> list[Image.Image]:
    """One picture per prompt of the request."""
    exported = formats.exported_files(run.export, run.name, tokens.placeholders(spec.tokens))
    return pipeline.draw_samples(
        open_base(spec, target, open_cache(run.runs)), exported, request.prompts, length=spec.model.max_sequence_length,
        steps=request.steps, size=request.size, scale=request.scale,
    )  # fmt: skip


def _sheet(
    names: Sequence[str], pictures: Sequence[Sequence[Image.Image]], request: SampleRequest, count: int
) -> Image.Image:
    """One run: a row per prompt and a column per seed. Several runs: a row per prompt and seed, and a column per
    run."""
    if len(names) > 1:
        rows = [
            (f"{prompt} (seed {seed})", [of_run[index] for of_run in pictures])
            for index, (prompt, seed) in enumerate(request.prompts)
        ]
        return contact_sheet.draw_contact_sheet(rows, names)
    starts = range(0, len(request.prompts), count)
    by_prompt = [(request.prompts[start][0], pictures[0][start : start + count]) for start in starts]
    return contact_sheet.draw_contact_sheet(by_prompt, [f"seed {seed}" for _, seed in request.prompts[:count]])
