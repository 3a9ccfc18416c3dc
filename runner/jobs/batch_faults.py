"""Faults between the jobs of one batch, each of which is fine by itself: one makes what another reads, or both write
one place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from runner.base.files import BaseIdentity, identity_of
from runner.core import hub
from runner.core.errors import Fault
from runner.core.humanize import list_some
from runner.data import class_images
from runner.jobs.job import Job
from runner.spec.schema import Prior


def batch_faults(jobs: Sequence[Job], owner: str) -> list[Fault]:
    """Each fault once. owner: the name of the hub login, "" if not known."""
    waiting = [job for job in jobs if not job.is_done]  # runs that are done make and read nothing more
    faults = [*_class_image_faults(waiting), *_training_image_faults(waiting), *_repository_faults(jobs, owner)]
    return list(dict.fromkeys(faults))


def _class_image_faults(waiting: Sequence[Job]) -> Iterator[Fault]:
    """Jobs that share a folder of class images must want the same ones: of one prompt, by one base."""
    first_job: dict[Path, tuple[Job, Prior]] = {}
    identity = cache(_identity)
    for job in waiting:
        prior = job.spec.prior
        if prior is None or any(key.startswith("prior") for key in job.faulty_keys):
            continue
        folder = Path(prior.images)
        other, other_prior = first_job.setdefault(folder, (job, prior))
        count = max(prior.count, other_prior.count)
        if class_images.has_no_note(folder) and not class_images.needs_filling(folder, count):
            continue  # none is made, and whether they suit both prompts is for the user to decide
        if prior.prompt != other_prior.prompt:
            yield job.source.fault(
                "prior.prompt",
                f"{_place(other, 'prior.prompt')} has another prompt for the same folder of class images (found "
                f"{prior.prompt!r}, there {other_prior.prompt!r}); {_remedy(job, 'prior.prompt', 'prompt')}",
            )
        elif not {"model", "model.base"} & (job.faulty_keys | other.faulty_keys):
            base, other_base = (identity(each.spec.model.base, each.spec.model.revision) for each in (job, other))
            if base.differs_from(other_base):
                yield job.source.fault(
                    "prior.images",
                    f"{_place(other, 'model.base')} has another base for the same folder of class images (found {base}, "
                    f"there {other_base}); {_remedy(job, 'model', 'base')}",
                )


def _identity(name: str, revision: str | None) -> BaseIdentity:
    """Without a revision, the hub gives the main branch."""
    identity = identity_of(name, revision)
    return identity if identity.fingerprint else replace(identity, revision=identity.revision or "main")


def _remedy(job: Job, key: str, what: str) -> str:
    if any(swept.startswith(key) for swept in job.source.swept):
        return f"take it out of the sweep, and write a spec for each {what}, with its own prior.images"
    return f"give this run its own prior.images, or the same {what}"


def _place(job: Job, key: str) -> str:
    file, line = job.source.location(key)
    return f"{file}:{line}"


def _training_image_faults(waiting: Sequence[Job]) -> Iterator[Fault]:
    """Images that one run makes must not become training images of another."""
    maker_by_folder: dict[Path, Job] = {}
    for job in waiting:
        if (prior := job.spec.prior) and class_images.needs_filling(Path(prior.images), prior.count):
            maker_by_folder.setdefault(Path(prior.images), job)
    job_by_folder = {job.run.folder.resolve(): job for job in waiting}
    for job in waiting:
        source = Path(job.spec.data.source)
        if "data.source" in job.faulty_keys or not source.is_absolute():
            continue
        for folder, maker in maker_by_folder.items():
            if folder.is_relative_to(source) and maker is not job:
                yield job.source.fault(
                    "data.source",
                    f"it holds {job.source.relative('data.source', str(folder))}, which run {maker.spec.name} fills with class "
                    f"images ({_place(maker, 'prior.images')}), so they would be trained on; name a folder elsewhere there",
                )
        for folder in (source, *source.parents):
            if (outer := job_by_folder.get(folder)) and outer is not job:
                yield job.source.fault(
                    "data.source",
                    f"it lies in the folder of run {outer.spec.name}, which is yet to be trained; queue "
                    "this spec once that run is done",
                )


def _repository_faults(jobs: Sequence[Job], owner: str) -> Iterator[Fault]:
    """Runs that push to one repository would replace each other's files, also those of a run that is done."""
    by_repository: dict[str, list[Job]] = {}
    for job in jobs:
        if job.spec.hub.push and "hub" not in job.faulty_keys:
            name = hub.repository(job.spec.hub.repo, job.spec.name)
            full_name = name if "/" in name else f"{owner}/{name}"
            by_repository.setdefault(full_name.lower(), []).append(job)  # the hub ignores case in names
    for sharing in by_repository.values():
        if len(sharing) < 2 or all(job.is_done for job in sharing):
            continue
        last = sharing[-1]
        repository = hub.repository(last.spec.hub.repo, last.spec.name)
        remedy = "give each its own"
        if last.source.swept:
            remedy = "take hub.repo out, and each run has a repository of its own name"
        names = list_some([job.spec.name for job in sharing])
        yield last.source.fault(
            "hub.repo", f"{len(sharing)} runs push to one repository (found {repository!r}, for {names}); {remedy}"
        )
