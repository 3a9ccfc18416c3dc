"""The export phase: write the files, read every one back, draw the pictures with stock diffusers, then put all in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from runner.base.files import licence, transformer_config
from runner.cache.store import Cache
from runner.checkpoint.storage import Checkpoint, Weights
from runner.core import contact_sheet, files, hub
from runner.core.command_line import fluxrun_command
from runner.core.errors import InterruptedRunError
from runner.core.events import EventLog
from runner.data import tokens
from runner.data.tokens import Placeholder, expand_placeholders
from runner.export import formats, pipeline, verify, webui
from runner.export.about import AdapterShapes, ExportInfo
from runner.export.loss_curve import draw_curve
from runner.export.model_card import CURVE, model_card
from runner.export.pipeline import ExportedFiles
from runner.model.base import Base
from runner.model.device import DTYPES, release
from runner.model.families import family_of
from runner.model.family import ModelFamily, PromptEmbeds
from runner.runs import sample_files
from runner.runs.run import Run
from runner.spec import export_names
from runner.spec.schema import Spec, dump, flat
from runner.training.adapter_shapes import lora_shape, text_lora_shape
from runner.training.encoders import frozen_embeddings
from runner.training.model_pool import ModelPool


@dataclass(frozen=True)
class ExportRequest:
    """What an export needs to know; the training data is not among it."""

    run: Run
    spec: Spec
    base: Base
    event_log: EventLog
    stop_requested: Callable[[], bool]
    cache: Cache
    model_pool: ModelPool

    @cached_property
    def family(self) -> ModelFamily:
        return family_of(self.base)

    @property
    def placeholders(self) -> tuple[Placeholder, ...]:
        return tokens.placeholders(self.spec.tokens)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.spec.export.dtype]


@dataclass(frozen=True)
class ExportResult:
    """step: the checkpoint's; errors: of each weight file, the largest; pictures: (prompt, picture)."""

    step: int
    errors: Mapping[str, float]
    pictures: Sequence[tuple[str, Image.Image]]


def export_phase(order: ExportRequest, made: Checkpoint | None) -> ExportResult:
    """Make `export/` and `samples/` from a checkpoint; the files in `export/` are the old ones or the new, never mixed.

    Raises BadFileError where a file does not give back what was trained; the run is then not done.
    """
    run, spec, step = order.run, order.spec, made.step if made else 0
    weights = made.weights if made else Weights()
    run.check_lease()
    aside = run.export.with_name(f".export{files.PARTIAL_SUFFIX}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    shapes = AdapterShapes(
        lora_shape(spec, order.base) if weights.lora else None,
        text_lora_shape(spec, order.base) if weights.text_lora else None,
    )
    about = _about(order, step)
    errors = _written(aside, weights, shapes, about, order.dtype)
    pictures = _verified_pictures(order, step, *_stored(weights, shapes, order.dtype), aside)
    shown = []
    for index, (prompt, _) in enumerate(pictures):
        name = f"samples/{index}.png"
        files.make_folder(aside / "samples")
        shutil.copyfile(sample_file(run, step, index), aside / name)
        shown.append((expand_placeholders(prompt, order.placeholders), name))
    points = made.scalars["meters"].get("curve") if made else None
    if points:
        files.make_folder(aside / "samples")
        files.write_png(aside / CURVE, draw_curve(points, f"{spec.name}: training loss, smoothed"))
    layers = shapes.lora.layers if shapes.lora else ()
    repo = spec.hub.repo if spec.hub.push and spec.hub.repo and "/" in spec.hub.repo else None
    card = model_card(about, errors, shown, pipeline.GUIDANCE, repo, layers, bool(points))
    files.write_text(aside / "README.md", card)
    run.check_lease()
    files.replace_folder(aside, run.export)
    return ExportResult(step, errors, pictures)


def sample_file(run: Run, step: int, index: int) -> Path:
    return run.samples / f"step-{step:06d}-{index}.png"


def _about(order: ExportRequest, step: int) -> ExportInfo:
    own = order.spec.model.base
    settings = {
        key: value
        for key, value in flat(dump(order.spec)).items()
        if not key.startswith(("data.source", "model.base", "prior.images", "hub", "notify"))
    }
    config = transformer_config(own, order.base.folder) or {}
    return ExportInfo(
        order.spec.name, Path(own).name if Path(own).is_dir() else own, step, order.placeholders, settings,
        licence(own, order.base.folder), export_day(order.run), bool(config.get("guidance_embeds")),
        version("fluxrun"), order.family.layer_names,
    )  # fmt: skip


def export_day(run: Run) -> str | None:
    """The day that the files tell: when the run began, or SOURCE_DATE_EPOCH, the convention of repeatable builds."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    return webui.day_of(float(fixed) if fixed else run.started_at())


def _stored(weights: Weights, shapes: AdapterShapes, dtype: torch.dtype) -> tuple[Weights, AdapterShapes]:
    """What diffusers loads of the files."""
    folded, its_shapes = formats.folded(weights, shapes)
    return formats.rounded(folded, dtype), its_shapes


def _written(
    folder: Path, weights: Weights, shapes: AdapterShapes, about: ExportInfo, dtype: torch.dtype
) -> dict[str, float]:
    """Write every weight file and read it back; the largest error of each. Raises BadFileError with the layer."""
    stored, errors = formats.rounded(weights, dtype), {}
    if weights.lora or weights.text_lora:
        trained = formats.adapter(formats.rounded(weights, torch.float32), shapes)
        path, original = folder / formats.LORA_FILE, folder / export_names.kohya_file(about.name)
        formats.write_lora(path, *_stored(weights, shapes, dtype))
        errors[path.name] = verify.lora_file(path, trained, dtype, about.layer_names)
        formats.write_kohya(original, stored, shapes, about)
        errors[original.name] = verify.kohya_file(original, trained, dtype, about.layer_names)
    if weights.rows:
        formats.write_embeddings(folder, stored, about.name)
        for path in (folder / export_names.embeddings_file(about.name), folder / export_names.webui_file(about.name)):
            if path.is_file():
                errors[path.name] = verify.embeddings(path, weights, dtype)
    return errors


def _verified_pictures(
    order: ExportRequest, step: int, stored: Weights, shapes: AdapterShapes, folder: Path
) -> list[tuple[str, Image.Image]]:
    """Load the files as their users will, compare, and draw with what was loaded: before (the base) and after."""
    own, placeholders, run = order.spec.validation, order.placeholders, order.run
    shots = sample_files.samples_of(own.prompts, own.count, order.spec.seed)
    exported = formats.exported_files(folder, order.spec.name, placeholders)
    order.event_log.line("export: reading the files back with diffusers")
    plain, learned = _read_prompts(order, stored, shapes, exported, [prompt for prompt, _ in shots])
    transformer = order.model_pool.take(order.base)
    pipe = order.family.image_pipeline(order.base, transformer, with_vae=bool(shots))
    size = pipeline.size_of(order.spec)
    order.event_log.begin_phase("pictures", 0, 2 * len(shots), "pictures")
    columns: list[list[Image.Image]] = []
    for at, reads in ((0, plain), (step, learned)):
        if columns and exported.lora:
            pipe.load_lora(exported.lora)
            if shapes.lora:
                verify.loaded_lora(pipe.transformer, stored.lora, shapes.lora)
        column = []
        for index, (prompt, (_, seed)) in enumerate(zip(reads, shots, strict=True)):
            column.append(pipeline.draw_image(pipe, prompt, seed, steps=own.steps, size=size))
            run.check_lease()
            files.write_png(sample_file(run, at, index), column[-1])
            order.event_log.progress(len(columns) * len(shots) + index + 1, 2 * len(shots), "pictures")
            if order.stop_requested():
                raise InterruptedRunError("stopped before the exports were complete; the same command goes on")
        columns.append(column)
    order.model_pool.put(order.base, order.spec.model, transformer)
    order.event_log.end_phase()
    if shots:
        rows = [(prompt, [before, after]) for (prompt, _), before, after in zip(shots, *columns, strict=True)]
        run.check_lease()
        files.write_png(run.samples / "before-after.png", contact_sheet.draw_contact_sheet(rows, ("before", "after")))
    return [(prompt, picture) for (prompt, _), picture in zip(shots, columns[1], strict=True)]


def _read_prompts(
    order: ExportRequest, stored: Weights, shapes: AdapterShapes, exported: ExportedFiles, prompts: Sequence[str]
) -> tuple[list[PromptEmbeds], list[PromptEmbeds]]:
    """The prompts as the base reads them, and with what was learned in the text encoders; that is compared on the way."""
    length, architecture = order.spec.model.max_sequence_length, order.family.architecture
    written = [expand_placeholders(prompt, order.placeholders) for prompt in prompts]
    # A large encoder that learned nothing reads what it read before the training, and the cache has that.
    large = [encoder for encoder in architecture.encoders.values() if encoder.large]
    with_large = any(encoder.name in stored.rows for encoder in large)

    def cached(texts: Sequence[str]) -> dict[str, list[Tensor]]:
        return (
            {}
            if with_large
            else {
                encoder.name: frozen_embeddings(encoder, order.base, order.cache, order.model_pool, order.spec, texts)
                for encoder in large
            }
        )

    pipe = order.family.text_pipeline(order.base, with_large=with_large)
    plain = pipe.read(prompts, length, cached=cached(prompts))
    if exported.embeddings:
        pipeline.load_embeddings(pipe, exported.embeddings, order.placeholders)
    verify.loaded_embeddings(pipe.encoders, stored, tokens.vocabulary_entries(order.placeholders))
    if exported.lora:
        pipe.load_lora(exported.lora)
    if shapes.text_lora and (adapted := architecture.text_lora_encoder):
        verify.loaded_lora(pipe.encoders[adapted.name][0], stored.text_lora, shapes.text_lora)
    learned = pipe.read(written, length, cached=cached(written))
    del pipe
    release(order.base.device)
    return plain, learned


def push(order: ExportRequest) -> None:
    """Upload the export folder. What goes wrong is told in the log and in the state, and ends nothing."""
    own, repo = order.spec.hub, hub.repository(order.spec.hub.repo, order.spec.name)
    order.event_log.line(f"export: pushing to {repo}")
    try:
        wrong = hub.push(order.run.export, repo, own.private, f"{order.spec.name}, by fluxrun", order.stop_requested)
    except KeyboardInterrupt:
        wrong = "interrupted"
    order.run.check_lease()
    if wrong is None:
        order.run.update_state(warning=None)
        return
    again = fluxrun_command("export", order.spec.name, "--push", runs=order.run.runs)
    warning = f"not pushed to {repo} ({wrong}); `{again}` tries again"
    order.event_log.line(f"warning: {warning}")
    order.run.update_state(warning=warning)
