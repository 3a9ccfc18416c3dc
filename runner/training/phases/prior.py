"""The prior phase: draws class images with the untrained base until the folder holds as many as the spec asks for."""

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

STEPS = 28  # FluxPipeline's default. Not from [validate], whose keys must not affect the training


def prior_phase(context: RunContext) -> None:
    """Fill the folder of class images; continues where an earlier run or attempt stopped.

    Raises FluxrunError if the images there are of another prompt or base, InterruptedRunError if a stop was requested.
    """
    prior = context.spec.prior
    assert prior is not None
    folder = files.make_folder(Path(prior.images))
    lock = folder / ".lock"  # another run may be filling the folder
    with locks.hold_lock(lock, timeout=math.inf, on_wait=context.check_stop):
        base_model = context.base_identity
        # checked again here, because the other run may have filled it since the queue began
        if disagreement := class_images.note_fault(folder, prior.prompt, base_model):
            raise FluxrunError(f"{disagreement[0]}: {disagreement[1]}")
        existing = len(class_images.image_paths(folder))
        context.event_log.message(
            f"prior: {existing} class images in {folder}, {max(0, prior.count - existing)} to make"
        )
        if existing >= prior.count:
            return
        class_images.write_note(folder, prior.prompt, base_model)
        dtype = DTYPES[prior.dtype] if prior.dtype else context.base.dtype
        base = replace(context.base, dtype=dtype)
        context.model_pool.clear(base)
        texts = context.family.text_pipeline(base)
        [prompt] = texts.read([prior.prompt], context.spec.model.max_sequence_length)
        del texts
        release(base.device)
        transformer = context.model_pool.acquire(base)
        pipe = context.family.image_pipeline(base, transformer)
        context.event_log.begin_phase("class images", existing, prior.count, "images")
        number = 0
        while (existing := len(class_images.image_paths(folder))) < prior.count:
            numbers: list[int] = []
            while len(numbers) < min(prior.batch_size, prior.count - existing):
                if not class_images.generated_path(folder, number).exists():
                    numbers.append(number)
                number += 1
            seeds = [derive(0, "class image", prior.prompt, number) for number in numbers]
            images = pipe.draw(
                prompt, seeds, steps=STEPS, size=max(resolutions(context.spec)), guidance=pipeline.GUIDANCE
            )
            for image_number, image in zip(numbers, images, strict=True):
                files.write_png(class_images.generated_path(folder, image_number), image)
            context.event_log.progress(existing + len(images), prior.count, "images")
            context.check_stop()
        context.model_pool.release(base, context.spec.model, transformer)
    release(context.base.device)
