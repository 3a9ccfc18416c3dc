"""The prior phase: class images by the base as it is, until the folder holds as many as asked."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from runner.core import files, locks
from runner.core.errors import FluxrunError
from runner.core.seeds import derive
from runner.data import class_images
from runner.export import pipeline
from runner.model.device import DTYPES, release
from runner.plan.build import resolutions
from runner.training.context import RunContext

STEPS = 28  # FluxPipeline's default; [validate] is about looking, and shall change nothing of the training


def prior_phase(context: RunContext) -> None:
    """Top the folder up. Another run's images of the same prompt and base count, others' are refused (FluxrunError); an
    interrupted filling goes on where it stopped."""
    own = context.spec.prior
    assert own is not None
    folder = files.make_folder(Path(own.images))
    with locks.hold_lock(
        folder / ".lock", patience=math.inf, waiting=context.check_stop
    ):  # another run may be filling it
        base_model = context.base_identity
        if wrong := class_images.prompt_disagreement(
            folder, own.prompt, base_model
        ):  # another run may have filled it by now
            raise FluxrunError(f"{wrong[0]}: {wrong[1]}")
        there = len(class_images.paths(folder))
        context.event_log.line(f"prior: {there} class images in {folder}, {max(0, own.count - there)} to make")
        if there >= own.count:
            return
        class_images.write_note(folder, own.prompt, base_model)
        dtype = DTYPES[own.dtype] if own.dtype else context.base.dtype
        base = replace(context.base, dtype=dtype)
        context.model_pool.clear(base)
        texts = context.family.text_pipeline(base)
        [prompt] = texts.read([own.prompt], context.spec.model.max_sequence_length)
        del texts
        release(base.device)
        transformer = context.model_pool.take(base)
        pipe = context.family.image_pipeline(base, transformer)
        context.event_log.begin_phase("class images", there, own.count, "images")
        number = 0
        while (there := len(class_images.paths(folder))) < own.count:
            numbers: list[int] = []
            while len(numbers) < min(own.batch_size, own.count - there):
                if not class_images.generated_path(folder, number).exists():
                    numbers.append(number)
                number += 1
            seeds = [derive(0, "class image", own.prompt, one) for one in numbers]
            made = pipe.draw(
                prompt, seeds, steps=STEPS, size=max(resolutions(context.spec)), guidance=pipeline.GUIDANCE
            )
            for one, image in zip(numbers, made, strict=True):
                files.write_png(class_images.generated_path(folder, one), image)
            context.event_log.progress(there + len(made), own.count, "images")
            context.check_stop()
        context.model_pool.put(base, context.spec.model, transformer)
    release(context.base.device)
