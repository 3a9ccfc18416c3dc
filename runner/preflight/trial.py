"""`fluxrun check --step`: a few real steps of every shape that will be trained, in a folder of their own that is thrown away.

They go through the queue's own trainer, so what is measured is what the night will do: loading, encoding, every training
phase, the export read back, one picture. No torch in this process.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runner.core.files import make_folder
from runner.core.humanize import format_bytes, format_duration
from runner.core.signals import StopRequest
from runner.data import images, sources, tokens
from runner.data.buckets import Size, bucket_sizes, group_by_bucket
from runner.data.images import Picture
from runner.engine import slots
from runner.engine.progress import Screen
from runner.engine.slots import make_slots
from runner.engine.supervisor import run_queue
from runner.jobs import timing
from runner.jobs.data_sets import data_source
from runner.jobs.job import Job, Planned
from runner.jobs.prepare import plan_of
from runner.plan.build import resolutions
from runner.preflight.finding import Finding, at
from runner.runs.run import Run
from runner.runs.status import RunStatus
from runner.spec.schema import Spec, dump

STEPS = 4  # so that both sides of a pivot are there, and the median is not of the first step

# What makes no difference to a step: two runs that differ only here are tried once.
SAME_STEP = ("name", "seed", "data", "train", "schedule", "checkpoint", "validate", "track", "hub")


def try_steps(seen: Sequence[Job], gpus: str | None) -> list[Finding]:
    """A note with time and memory for each shape, or an error where its steps failed."""
    with (
        tempfile.TemporaryDirectory(prefix="fluxrun-step-") as name,
        StopRequest(None, interrupt_on_second=False) as stop,
    ):
        scratch = Path(name)
        tried = list(_trials(seen, scratch))
        jobs = [job for _, _, job in tried]
        most = max((job.spec.compute.gpus for job in jobs), default=1)
        if jobs:
            make_folder(scratch / "runs")
            places = make_slots(gpus, 1, most, scratch / "runs")
            run_queue(jobs, scratch / "runs", places, Screen(), stop, retries=0, fail_fast=False)
            timing.remember_timing(jobs, on_gpu=slots.on_gpus(places))
        return [_told(one, shape, job) for one, shape, job in tried]


def _told(seen: Job, shape: Size, job: Job) -> Finding:
    state, batch = job.run.state(), seen.spec.train.batch_size
    what = f"{shape[0]}x{shape[1]} x {batch}"
    if state.state != "done" or state.s_per_step is None or state.peak_memory_bytes is None:
        return at(
            seen.source, "error", "data.resolution",
            f"the first steps of {what} failed ({state.error or state.state}); see model and train for what "
            "needs less memory",
        )  # fmt: skip
    pace, steps = float(state.s_per_step), seen.plan.steps if seen.planned else 0
    return at(
        seen.source, "note", "data.resolution",
        f"a step of {what} takes {pace:.3g} s, its peak is {format_bytes(state.peak_memory_bytes)}; {steps} such steps take "
        f"{format_duration(pace * steps)}",
    )  # fmt: skip


def _trials(seen: Sequence[Job], scratch: Path) -> Iterator[tuple[Job, Size, Job]]:
    known = set()
    for one in seen:
        if one.planned is None or one.pictures is None:
            continue
        own = one.spec
        step = {key: value for key, value in dump(own).items() if key not in SAME_STEP}
        for shape, pictures in _shapes(own, one.pictures.items).items():
            facts = repr((step, shape, own.train.batch_size, own.train.accumulate))
            if facts not in known:
                known.add(facts)
                yield one, shape, _trial(one, shape, pictures, scratch, len(known))


def _shapes(spec: Spec, pictures: Sequence[Picture]) -> dict[Size, list[Picture]]:
    sizes = [images.measure(picture) if spec.data.buckets else (1, 1) for picture in pictures]
    found = group_by_bucket(sizes, resolutions(spec), spec.data.buckets)
    return {shape: [pictures[index] for index in chosen] for shape, chosen in found.items()}


def _trial(seen: Job, shape: Size, pictures: Sequence[Picture], scratch: Path, number: int) -> Job:
    """The same run with a batch of pictures of this shape, and a few steps."""
    own = seen.spec
    known = tokens.placeholders(own.tokens)
    folder = scratch / f"pictures-{number}"
    make_folder(folder)
    for index, picture in enumerate(pictures[: own.train.batch_size]):
        images.decode(picture).save(folder / f"{index}.png")
        missing = {one.name for one in known} - tokens.tokens_in_caption(picture.caption, known)
        (folder / f"{index}.txt").write_text(" ".join([picture.caption, *sorted(missing)]), encoding="utf-8")
    side = next(one for one in resolutions(own) if shape in (bucket_sizes(one) if own.data.buckets else ((one, one),)))
    reading: dict[str, Any] = {"source": str(folder), "resolution": side, "holdout": 0, "repeats": 1}
    changed: dict[str, Any] = {
        "name": f"step-{number}",
        "data": own.data.model_copy(update={**reading, "image_column": "image", "caption_column": None}),
        "train": own.train.model_copy(update={"steps": STEPS, "epochs": None}),
        "schedule": own.schedule.model_copy(update={"warmup": 0}),
        "checkpoint": own.checkpoint.model_copy(update={"every": STEPS, "minutes": None}),
        "validation": own.validation.model_copy(
            update={"prompts": own.validation.prompts[:1], "every": None, "count": 1, "steps": 1}
        ),
        "track": own.track.model_copy(update={"to": ()}),
        "hub": own.hub.model_copy(update={"push": False}),
    }
    if own.prior:  # the class images are another matter: copies of these stand for them
        classes = scratch / f"classes-{number}"
        shutil.copytree(folder, classes)
        count = len(list(classes.glob("*.png")))
        changed["prior"] = own.prior.model_copy(update={"images": str(classes), "count": count})
    spec = own.model_copy(update=changed)
    read = sources.read_source(data_source(spec))
    run = Run(scratch / "runs", spec.name)
    return Job(seen.source, spec, run, read, Planned(plan_of(spec, read), RunStatus("new", "a trial")))
