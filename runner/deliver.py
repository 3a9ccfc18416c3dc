"""The export phase: write the files, read every one back with stock diffusers, draw the pictures, then put all in place."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from runner import export, files, sample
from runner.checkpoint import Weights
from runner.desk import Desk
from runner.device import release
from runner.encode import text_lora_shape
from runner.errors import FluxrunError
from runner.learn import lora_shape
from runner.rundir import Run, flat
from runner.sample import Exported
from runner.spec import dump
from runner.tokens import expand


def deliver(desk: Desk, run: Run, weights: Weights) -> list[tuple[str, Image.Image]]:
    """Make `export/` and `samples/`. Returns the final pictures as (prompt, picture), for the tracker.

    Raises BadFile where a file does not give back what was trained; the run is then not done.
    """
    aside = run.export.with_name(f".export{files.ASIDE}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    stem = export.file_stem(desk.plan.name)
    if weights.lora or weights.text_lora:
        shapes = export.Shapes(
            lora_shape(desk) if weights.lora else None, text_lora_shape(desk) if weights.text_lora else None
        )
        export.write_lora(aside / export.LORA_FILE, weights, shapes)
    if weights.rows:
        export.write_embeddings(aside / f"{stem}_emb.safetensors", weights)
    exported = export.exported_files(aside, desk.plan.name, desk.plan.placeholders)
    pictures = _verified_pictures(desk, run, weights, exported)
    shown = []
    for index, (prompt, _) in enumerate(pictures):
        name = f"samples/{index}.png"
        files.make_folder(aside / "samples")
        shutil.copyfile(sample_file(run, desk.plan.steps, index), aside / name)
        shown.append((expand(prompt, desk.plan.placeholders), name))
    settings = {
        key: value
        for key, value in flat(dump(desk.spec)).items()
        if not key.startswith(("data.source", "model.base", "prior", "hub"))
    }
    named = desk.spec.model.base if not Path(desk.spec.model.base).is_dir() else Path(desk.spec.model.base).name
    card = export.model_card(
        desk.plan.name, named, settings, exported, shown, sample.GUIDANCE, desk.spec.model.max_sequence_length,
        desk.spec.inversion.pooling,
    )  # fmt: skip
    files.write_text(aside / "README.md", card)
    files.replace_folder(aside, run.export)
    return pictures


def sample_file(run: Run, step: int, index: int) -> Path:
    return run.samples / f"step-{step:06d}-{index}.png"


def _verified_pictures(desk: Desk, run: Run, weights: Weights, exported: Exported) -> list[tuple[str, Image.Image]]:
    """Load the files as their users will, compare, and draw with what was loaded: before (the base) and after."""
    own = desk.spec.validation
    shots = sample.shots(own.prompts, own.count, desk.spec.seed)
    placeholders, length = desk.plan.placeholders, desk.spec.model.max_sequence_length

    desk.say.line("export: reading the files back with diffusers")
    pipe = sample.text_pipeline(desk.base, None)
    plain = sample.read_prompts(pipe, [prompt for prompt, _ in shots], length)
    if exported.embeddings:
        sample.load_embeddings(pipe, exported.embeddings, placeholders)
    export.verify_embeddings(pipe, weights, desk.pieces)
    if exported.lora:
        sample.load_text_lora(pipe, exported.lora)
    if weights.text_lora:
        export.verify_lora(pipe.text_encoder, weights.text_lora, text_lora_shape(desk))
    learned = sample.read_prompts(pipe, [expand(prompt, placeholders) for prompt, _ in shots], length)
    del pipe
    release(desk.base.device)

    pipe = sample.image_pipeline(desk.base)
    size = sample.size_of(desk.spec)
    desk.say.begin_phase("pictures", 0, 2 * len(shots), "pictures")
    columns: list[list[Image.Image]] = []
    for step, reads in ((0, plain), (desk.plan.steps, learned)):
        if step and exported.lora:
            sample.load_lora(pipe, exported.lora)
            if weights.lora:
                export.verify_lora(pipe.transformer, weights.lora, lora_shape(desk))
        column = []
        for index, (read, (_, seed)) in enumerate(zip(reads, shots, strict=True)):
            column.append(sample.draw(pipe, read, seed, steps=own.steps, size=size))
            files.write_png(sample_file(run, step, index), column[-1])
            desk.say.progress(len(columns) * len(shots) + index + 1, 2 * len(shots), "pictures")
            desk.check_stop()
        columns.append(column)
    desk.say.end_phase()
    if shots:
        rows = [(prompt, [before, after]) for (prompt, _), before, after in zip(shots, *columns, strict=True)]
        files.write_png(run.samples / "before-after.png", sample.sheet(rows, ("before", "after")))
    return [(prompt, picture) for (prompt, _), picture in zip(shots, columns[1], strict=True)]


def push(desk: Desk, run: Run) -> None:
    """Upload the export folder as it is; the login is the hub's own (HF_TOKEN, `hf auth login`)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    own = desk.spec.hub
    wanted = own.repo or export.file_stem(desk.plan.name)  # without an owner it is the login's own
    desk.say.line(f"export: pushing to {wanted}")
    try:
        api = HfApi()
        repo = api.create_repo(wanted, private=own.private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=run.export, commit_message=f"{desk.plan.name}, by fluxrun")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise FluxrunError(
            f"{run.export} is complete, but pushing it to {wanted} failed ({error}); check hub.repo and `hf auth login`"
        ) from error
