"""The export phase: write the files, read each one back, draw samples with stock diffusers, then put all in place."""

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
from runner.spec.schema import Spec, dump
from runner.spec.tables import flatten
from runner.training.adapter_shapes import lora_shape, text_lora_shape
from runner.training.encoders import frozen_embeddings
from runner.training.model_pool import ModelPool


@dataclass(frozen=True)
class ExportRequest:
    """What an export needs. The training data is not needed."""

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
    """step: of the exported checkpoint. errors: largest absolute error of any weight, by file. pictures: (prompt,
    picture)."""

    step: int
    errors: Mapping[str, float]
    pictures: Sequence[tuple[str, Image.Image]]


def export_phase(request: ExportRequest, checkpoint: Checkpoint | None) -> ExportResult:
    """Make `export/` and `samples/` from a checkpoint. `export/` is replaced as a whole, so old and new files never
    mix.

    Raises BadFileError if a file does not give back what was trained; the run is then not done.
    """
    run, spec, step = request.run, request.spec, checkpoint.step if checkpoint else 0
    weights = checkpoint.weights if checkpoint else Weights()
    run.check_lease()
    staging = run.export.with_name(f".export{files.PARTIAL_SUFFIX}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    shapes = AdapterShapes(
        lora_shape(spec, request.base) if weights.lora else None,
        text_lora_shape(spec, request.base) if weights.text_lora else None,
    )
    about = _about(request, step)
    errors = _write_and_verify(staging, weights, shapes, about, request.dtype)
    pictures = _verified_pictures(request, step, *_stored_weights(weights, shapes, request.dtype), staging)
    shown = []
    for index, (prompt, _) in enumerate(pictures):
        name = f"samples/{index}.png"
        files.make_folder(staging / "samples")
        shutil.copyfile(sample_file(run, step, index), staging / name)
        shown.append((expand_placeholders(prompt, request.placeholders), name))
    points = checkpoint.scalars["meters"].get("curve") if checkpoint else None
    if points:
        files.make_folder(staging / "samples")
        files.write_png(staging / CURVE, draw_curve(points, f"{spec.name}: training loss, smoothed"))
    layers = shapes.lora.layers if shapes.lora else ()
    repo = spec.hub.repo if spec.hub.push and spec.hub.repo and "/" in spec.hub.repo else None
    card = model_card(about, errors, shown, pipeline.GUIDANCE, repo, layers, bool(points))
    files.write_text(staging / "README.md", card)
    run.check_lease()
    files.replace_folder(staging, run.export)
    return ExportResult(step, errors, pictures)


def sample_file(run: Run, step: int, index: int) -> Path:
    return run.samples / f"step-{step:06d}-{index}.png"


def _about(request: ExportRequest, step: int) -> ExportInfo:
    base_name = request.spec.model.base
    settings = {
        key: value
        for key, value in flatten(dump(request.spec)).items()
        if not key.startswith(("data.source", "model.base", "prior.images", "hub", "notify"))
    }
    config = transformer_config(base_name, request.base.folder) or {}
    return ExportInfo(
        request.spec.name, Path(base_name).name if Path(base_name).is_dir() else base_name, step, request.placeholders, settings,
        licence(base_name, request.base.folder), export_day(request.run), bool(config.get("guidance_embeds")),
        version("fluxrun"), request.family.layer_names,
    )  # fmt: skip


def export_day(run: Run) -> str | None:
    """The day that the files name: when the run began, or SOURCE_DATE_EPOCH (the convention of reproducible builds)."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    return webui.day_of(float(fixed) if fixed else run.started_at())


def _stored_weights(weights: Weights, shapes: AdapterShapes, dtype: torch.dtype) -> tuple[Weights, AdapterShapes]:
    """The weights and shapes that diffusers gets when it loads the files."""
    folded, folded_shapes = formats.folded(weights, shapes)
    return formats.rounded(folded, dtype), folded_shapes


def _write_and_verify(
    folder: Path, weights: Weights, shapes: AdapterShapes, about: ExportInfo, dtype: torch.dtype
) -> dict[str, float]:
    """Write every weight file and read it back. The largest error, by file. Raises BadFileError with the layer."""
    stored, errors = formats.rounded(weights, dtype), {}
    if weights.lora or weights.text_lora:
        trained = formats.adapter(formats.rounded(weights, torch.float32), shapes)
        path, kohya_path = folder / formats.LORA_FILE, folder / export_names.kohya_file(about.name)
        formats.write_lora(path, *_stored_weights(weights, shapes, dtype))
        errors[path.name] = verify.lora_file(path, trained, dtype, about.layer_names)
        formats.write_kohya(kohya_path, stored, shapes, about)
        errors[kohya_path.name] = verify.kohya_file(kohya_path, trained, dtype, about.layer_names)
    if weights.rows:
        formats.write_embeddings(folder, stored, about.name)
        for path in (folder / export_names.embeddings_file(about.name), folder / export_names.webui_file(about.name)):
            if path.is_file():
                errors[path.name] = verify.embeddings(path, weights, dtype)
    return errors


def _verified_pictures(
    request: ExportRequest, step: int, stored: Weights, shapes: AdapterShapes, folder: Path
) -> list[tuple[str, Image.Image]]:
    """Load the files as their users will, compare, and draw the samples with the base alone and with what was loaded.

    (prompt, picture) with what was loaded. Raises BadFileError with the layer, InterruptedRunError.
    """
    validation, placeholders, run = request.spec.validation, request.placeholders, request.run
    samples = sample_files.samples_of(validation.prompts, validation.count, request.spec.seed)
    exported = formats.exported_files(folder, request.spec.name, placeholders)
    request.event_log.message("export: reading the files back with diffusers")
    base_prompts, trained_prompts = _read_prompts(request, stored, shapes, exported, [prompt for prompt, _ in samples])
    transformer = request.model_pool.acquire(request.base)
    pipe = request.family.image_pipeline(request.base, transformer, with_vae=bool(samples))
    size = pipeline.size_of(request.spec)
    request.event_log.begin_phase("pictures", 0, 2 * len(samples), "pictures")
    columns: list[list[Image.Image]] = []
    for sampled_step, prompts in ((0, base_prompts), (step, trained_prompts)):
        if columns and exported.lora:
            pipe.load_lora(exported.lora)
            if shapes.lora:
                verify.loaded_lora(pipe.transformer, stored.lora, shapes.lora)
        column = []
        for index, (prompt, (_, seed)) in enumerate(zip(prompts, samples, strict=True)):
            column.append(pipeline.draw_image(pipe, prompt, seed, steps=validation.steps, size=size))
            run.check_lease()
            files.write_png(sample_file(run, sampled_step, index), column[-1])
            request.event_log.progress(len(columns) * len(samples) + index + 1, 2 * len(samples), "pictures")
            if request.stop_requested():
                raise InterruptedRunError("stopped before the exports were complete; the same command goes on")
        columns.append(column)
    request.model_pool.release(request.base, request.spec.model, transformer)
    request.event_log.end_phase()
    if samples:
        rows = [(prompt, [before, after]) for (prompt, _), before, after in zip(samples, *columns, strict=True)]
        run.check_lease()
        files.write_png(run.samples / "before-after.png", contact_sheet.draw_contact_sheet(rows, ("before", "after")))
    return [(prompt, picture) for (prompt, _), picture in zip(samples, columns[1], strict=True)]


def _read_prompts(
    request: ExportRequest, stored: Weights, shapes: AdapterShapes, exported: ExportedFiles, prompts: Sequence[str]
) -> tuple[list[PromptEmbeds], list[PromptEmbeds]]:
    """The prompts' embeddings from the base, and from the text encoders with what was learned. Compares the encoders
    with what was trained. Raises BadFileError."""
    length, architecture = request.spec.model.max_sequence_length, request.family.architecture
    expanded = [expand_placeholders(prompt, request.placeholders) for prompt in prompts]
    # If no large encoder learned anything, its embeddings are those from before the training, which are in the cache.
    large = [encoder for encoder in architecture.encoders.values() if encoder.large]
    with_large = any(encoder.name in stored.rows for encoder in large)

    def cached(texts: Sequence[str]) -> dict[str, list[Tensor]]:
        if with_large:
            return {}
        return {
            encoder.name: frozen_embeddings(
                encoder, request.base, request.cache, request.model_pool, request.spec, texts
            )
            for encoder in large
        }

    pipe = request.family.text_pipeline(request.base, with_large=with_large)
    base_prompts = pipe.read(prompts, length, cached=cached(prompts))
    if exported.embeddings:
        pipeline.load_embeddings(pipe, exported.embeddings, request.placeholders)
    verify.loaded_embeddings(pipe.encoders, stored, tokens.vocabulary_entries(request.placeholders))
    if exported.lora:
        pipe.load_lora(exported.lora)
    if shapes.text_lora and (adapted := architecture.text_lora_encoder):
        verify.loaded_lora(pipe.encoders[adapted.name][0], stored.text_lora, shapes.text_lora)
    trained_prompts = pipe.read(expanded, length, cached=cached(expanded))
    del pipe
    release(request.base.device)
    return base_prompts, trained_prompts


def push(request: ExportRequest) -> None:
    """Upload the export folder. A failure is only logged and noted in state.json, because the run itself is done."""
    repo = hub.repository(request.spec.hub.repo, request.spec.name)
    request.event_log.message(f"export: pushing to {repo}")
    try:
        problem = hub.push(
            request.run.export,
            repo,
            request.spec.hub.private,
            f"{request.spec.name}, by fluxrun",
            request.stop_requested,
        )
    except KeyboardInterrupt:
        problem = "interrupted"
    request.run.check_lease()
    if problem is None:
        request.run.update_state(warning=None)
        return
    retry = fluxrun_command("export", request.spec.name, "--push", runs=request.run.runs)
    warning = f"not pushed to {repo} ({problem}); `{retry}` tries again"
    request.event_log.message(f"warning: {warning}")
    request.run.update_state(warning=warning)
