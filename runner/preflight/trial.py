"""`fluxrun check --step`: a few real steps of every image shape that will be trained, in a temporary folder.

They run in the queue's own worker, so they measure what the run will do: loading, encoding, every training phase, the
export read back, and one picture.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from runner.spec.schema import Data, Spec, dump

STEPS = 4  # so that training continues on both sides of a pivot, and the median step time is not that of the first step

# Tables of the spec that make no difference to a step: runs that differ only in them are tried once.
SAME_STEP = ("name", "seed", "data", "train", "schedule", "checkpoint", "validate", "track", "hub")


@dataclass(frozen=True)
class Trial:
    """A few steps of one shape. job: the user's. trial_job: the shortened one that is trained."""

    job: Job
    shape: Size
    trial_job: Job


def try_steps(jobs: Sequence[Job], gpus: str | None) -> list[Finding]:
    """A note with the time and memory of each shape, or an error where its steps failed."""
    with (
        tempfile.TemporaryDirectory(prefix="fluxrun-step-") as name,
        StopRequest(None, interrupt_on_second=False) as stop,
    ):
        scratch = Path(name)
        trials = list(_make_trials(jobs, scratch))
        trial_jobs = [trial.trial_job for trial in trials]
        gpus_per_run = max((job.spec.compute.gpus for job in trial_jobs), default=1)
        if trial_jobs:
            make_folder(scratch / "runs")
            queue_slots = make_slots(gpus, 1, gpus_per_run, scratch / "runs")
            run_queue(trial_jobs, scratch / "runs", queue_slots, Screen(), stop, retries=0, fail_fast=False)
            timing.remember_timing(trial_jobs, on_gpu=slots.on_gpus(queue_slots))
        return [_result(trial) for trial in trials]


def _result(trial: Trial) -> Finding:
    job, state = trial.job, trial.trial_job.run.state()
    batch = f"{trial.shape[0]}x{trial.shape[1]} x {job.spec.train.batch_size}"
    if state.state != "done" or state.s_per_step is None or state.peak_memory_bytes is None:
        return at(
            job.source, "error", "data.resolution",
            f"the first steps of {batch} failed ({state.error or state.state}); see model and train for what "
            "needs less memory",
        )  # fmt: skip
    seconds, steps = state.s_per_step, job.plan.steps if job.planned else 0
    return at(
        job.source, "note", "data.resolution",
        f"a step of {batch} takes {seconds:.3g} s, its peak is {format_bytes(state.peak_memory_bytes)}; {steps} such steps "
        f"take {format_duration(seconds * steps)}",
    )  # fmt: skip


def _make_trials(jobs: Sequence[Job], scratch: Path) -> Iterator[Trial]:
    """A trial for each shape of each job, without those that would train the same."""
    tried = set()
    for job in jobs:
        if job.planned is None or job.pictures is None:
            continue
        spec = job.spec
        relevant = {key: value for key, value in dump(spec).items() if key not in SAME_STEP}
        for shape, pictures in _pictures_by_shape(spec, job.pictures.items).items():
            content = repr((relevant, shape, spec.train.batch_size, spec.train.accumulate))
            if content not in tried:
                tried.add(content)
                yield Trial(job, shape, _make_trial_job(job, shape, pictures, scratch, len(tried)))


def _pictures_by_shape(spec: Spec, pictures: Sequence[Picture]) -> dict[Size, list[Picture]]:
    sizes = [images.measure(picture) if spec.data.buckets else (1, 1) for picture in pictures]
    buckets = group_by_bucket(sizes, resolutions(spec), spec.data.buckets)
    return {shape: [pictures[index] for index in indices] for shape, indices in buckets.items()}


def _make_trial_job(job: Job, shape: Size, pictures: Sequence[Picture], scratch: Path, number: int) -> Job:
    """The same job with a batch of pictures of this shape, and only a few steps."""
    spec = job.spec
    folder = scratch / f"pictures-{number}"
    _write_batch(folder, spec, pictures[: spec.train.batch_size])
    changes: dict[str, Any] = {
        "name": f"step-{number}",
        "data": _trial_data(spec, shape, folder),
        "train": spec.train.model_copy(update={"steps": STEPS, "epochs": None}),
        "schedule": spec.schedule.model_copy(update={"warmup": 0}),
        "checkpoint": spec.checkpoint.model_copy(update={"every": STEPS, "minutes": None}),
        "validation": spec.validation.model_copy(
            update={"prompts": spec.validation.prompts[:1], "every": None, "count": 1, "steps": 1}
        ),
        "track": spec.track.model_copy(update={"to": ()}),
        "hub": spec.hub.model_copy(update={"push": False}),
    }
    if spec.prior:  # the batch's pictures stand in for the class images
        class_folder = scratch / f"classes-{number}"
        shutil.copytree(folder, class_folder)
        count = len(list(class_folder.glob("*.png")))
        changes["prior"] = spec.prior.model_copy(update={"images": str(class_folder), "count": count})
    trial_spec = spec.model_copy(update=changes)
    trial_pictures = sources.read_source(data_source(trial_spec))
    run = Run(scratch / "runs", trial_spec.name)
    planned = Planned(plan_of(trial_spec, trial_pictures), RunStatus("new", "a trial"))
    return Job(job.source, trial_spec, run, trial_pictures, planned)


def _write_batch(folder: Path, spec: Spec, pictures: Sequence[Picture]) -> None:
    """Write pictures and captions. Each caption names all tokens, as the plan demands."""
    placeholders = tokens.placeholders(spec.tokens)
    make_folder(folder)
    for index, picture in enumerate(pictures):
        images.decode(picture).save(folder / f"{index}.png")
        names = {placeholder.name for placeholder in placeholders}
        missing = names - tokens.tokens_in_caption(picture.caption, placeholders)
        (folder / f"{index}.txt").write_text(" ".join([picture.caption, *sorted(missing)]), encoding="utf-8")


def _trial_data(spec: Spec, shape: Size, folder: Path) -> Data:
    """The spec's `data` for the trial's folder, at the resolution that gives this shape."""
    buckets = spec.data.buckets
    resolution = next(
        side for side in resolutions(spec) if shape in (bucket_sizes(side) if buckets else ((side, side),))
    )
    return spec.data.model_copy(
        update={
            "source": str(folder), "resolution": resolution, "holdout": 0, "repeats": 1, "image_column": "image",
            "caption_column": None,
        }
    )  # fmt: skip
