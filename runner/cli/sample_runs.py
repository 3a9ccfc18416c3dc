"""`fluxrun sample`: pictures from what runs exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from runner.cache.store import Cache
from runner.core import contact_sheet, files
from runner.core.command_line import fluxrun_command
from runner.core.errors import FluxrunError
from runner.data import tokens
from runner.export import formats, pipeline
from runner.model import device
from runner.model.flux1 import loading
from runner.runs import sample_files
from runner.runs.run import Run, read_spec
from runner.spec.export_names import file_stem
from runner.spec.schema import Spec
from runner.training.context import open_base

SHEET = "sample-sheet.png"


@dataclass(frozen=True)
class SampleRequest:
    """What is drawn of every run: (prompt, seed) each, alike for all of them."""

    shots: tuple[tuple[str, int], ...]
    steps: int
    size: int
    scale: float


def sample_runs(
    runs: Path, names: Sequence[str], prompts: Sequence[str], *, count: int, seed: int | None, steps: int | None,
    scale: float, gpus: str | None, out: Path | None,
) -> list[Path]:  # fmt: skip
    """Write the pictures, and where there are several a contact sheet of all; returns their paths, the sheet's last.

    Prompts, seed, steps and size default to the first run's, so that runs are compared on equal terms. Raises
    FluxrunError where a run has no exports or there is no prompt.
    """
    found = [_exported(Run(runs, name)) for name in dict.fromkeys(names)]
    if out is not None:
        files.output_folder(out / SHEET)  # before minutes of drawing, not after
    spec = found[0][1]
    chosen = tuple(prompts) or spec.validation.prompts
    if not chosen:
        raise FluxrunError("no prompt: give --prompt, or validate.prompts in the spec")
    first = spec.seed if seed is None else seed
    shots = tuple(sample_files.samples_of(chosen, count, first))
    wish = SampleRequest(shots, steps or spec.validation.steps, pipeline.size_of(spec), scale)
    where = device.choose_device(gpus)
    loading.quiet()
    columns, written = [], []
    for run, own in found:
        columns.append(_draw(run, own, wish, gpus))
        device.release(where)
        folder = files.make_folder(out or run.samples)
        before = f"{file_stem(run.name)}-" if out and len(found) > 1 else ""
        for number, (picture, (_, used)) in enumerate(zip(columns[-1], shots, strict=True)):
            written.append(folder / f"{before}sample-{number // count}-seed{used}.png")
            files.write_png(written[-1], picture)
    if len(written) > 1:
        written.append((out or found[0][0].samples) / SHEET)
        files.write_png(written[-1], _sheet([run.name for run, _ in found], columns, wish, count))
    return written


def _exported(run: Run) -> tuple[Run, Spec]:
    if not run.export.is_dir():
        ask = fluxrun_command("status", runs=run.runs)
        raise FluxrunError(f"{run.export}: no exports; `{ask}` tells how far the run is")
    return run, read_spec(run.spec_file)


def _draw(run: Run, spec: Spec, wish: SampleRequest, gpus: str | None) -> list[Image.Image]:
    placeholders = tokens.placeholders(spec.tokens)
    exported = formats.exported_files(run.export, run.name, placeholders)
    return pipeline.draw_samples(
        open_base(spec, gpus, Cache(run.runs / "cache")), exported, wish.shots, length=spec.model.max_sequence_length, steps=wish.steps,
        size=wish.size, scale=wish.scale,
    )  # fmt: skip


def _sheet(
    names: Sequence[str], columns: Sequence[Sequence[Image.Image]], wish: SampleRequest, count: int
) -> Image.Image:
    """One run: a row per prompt, a column per seed. Several: a row per picture, a column per run."""
    if len(names) > 1:
        rows = [
            (f"{prompt} (seed {seed})", [column[index] for column in columns])
            for index, (prompt, seed) in enumerate(wish.shots)
        ]
        return contact_sheet.draw_contact_sheet(rows, names)
    starts = range(0, len(wish.shots), count)
    one = [(wish.shots[start][0], columns[0][start : start + count]) for start in starts]
    return contact_sheet.draw_contact_sheet(one, [f"seed {seed}" for _, seed in wish.shots[:count]])
