"""Conflicts between runs of one batch that are valid on their own.

For example, one generates images into a folder that another trains on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from runner.base.files import BaseIdentity, identity_of
from runner.core import hub
from runner.core.errors import Fault
from runner.core.humanize import list_some
from runner.data import class_images

if TYPE_CHECKING:
    from runner.jobs.job import Job
    from runner.spec.schema import Prior


def batch_faults(seen: Sequence[Job], owner: str) -> list[Fault]:
    """Each once. Runs that are done make and read nothing more. owner: the hub login's name, where it is known."""
    waiting = [one for one in seen if not one.is_done]
    return list(dict.fromkeys([*_class_folders(waiting), *_pictures_made(waiting), *_same_repository(seen, owner)]))


def _class_folders(waiting: Sequence[Job]) -> Iterator[Fault]:
    """Runs that share a folder of class images want the same ones: of one prompt, by one base."""
    first: dict[Path, tuple[Job, Prior]] = {}
    identity = cache(_identity)
    for one in waiting:
        own = one.spec.prior
        if own is None or any(key.startswith("prior") for key in one.faulty_keys):
            continue
        folder = Path(own.images)
        other, others = first.setdefault(folder, (one, own))
        if class_images.is_users_own(folder) and not class_images.needs_filling(folder, max(own.count, others.count)):
            continue  # none is made, and whose prompt they fit is for the user to say
        if own.prompt != others.prompt:
            yield one.source.fault(
                "prior.prompt",
                f"{_place(other, 'prior.prompt')} has another prompt for the same folder of class images (found "
                f"{own.prompt!r}, there {others.prompt!r}); {_way_out(one, 'prior.prompt', 'prompt')}",
            )
        elif not {"model", "model.base"} & (one.faulty_keys | other.faulty_keys):
            base, theirs = (identity(each.spec.model.base, each.spec.model.revision) for each in (one, other))
            if base.differs_from(theirs):
                yield one.source.fault(
                    "prior.images",
                    f"{_place(other, 'model.base')} has another base for the same folder of class images (found {base}, "
                    f"there {theirs}); {_way_out(one, 'model', 'base')}",
                )


def _identity(name: str, revision: str | None) -> BaseIdentity:
    """A revision that is not given is the main branch, which may be another one than that which is given."""
    found = identity_of(name, revision)
    return found if found.fingerprint else replace(found, revision=found.revision or "main")


def _way_out(one: Job, key: str, what: str) -> str:
    if any(swept.startswith(key) for swept in one.source.swept):
        return f"take it out of the sweep, and write a spec for each {what}, with its own prior.images"
    return f"give this run its own prior.images, or the same {what}"


def _place(one: Job, key: str) -> str:
    file, line = one.source.location(key)
    return f"{file}:{line}"


def _pictures_made(waiting: Sequence[Job]) -> Iterator[Fault]:
    """Pictures that one run makes must not become training pictures of another."""
    filled: dict[Path, Job] = {}
    for one in waiting:
        if (own := one.spec.prior) and class_images.needs_filling(Path(own.images), own.count):
            filled.setdefault(Path(own.images), one)
    folders = {one.run.folder.resolve(): one for one in waiting}
    for one in waiting:
        source = Path(one.spec.data.source)
        if "data.source" in one.faulty_keys or not source.is_absolute():
            continue
        for images, maker in filled.items():
            if images.is_relative_to(source) and maker is not one:
                yield one.source.fault(
                    "data.source",
                    f"it holds {one.source.relative('data.source', str(images))}, which run {maker.spec.name} fills with class images "
                    f"({_place(maker, 'prior.images')}), so they would be trained on; name a folder elsewhere there",
                )
        for around in (source, *source.parents):
            if (trained := folders.get(around)) and trained is not one:
                yield one.source.fault(
                    "data.source",
                    f"it lies in the folder of run {trained.spec.name}, which is yet to be trained; queue "
                    "this spec once that run is done",
                )


def _same_repository(seen: Sequence[Job], owner: str) -> Iterator[Fault]:
    """Runs that push to one repository would replace each other's files; those of earlier nights, too."""
    pushing: dict[str, list[Job]] = {}
    for one in seen:
        if one.spec.hub.push and "hub" not in one.faulty_keys:
            name = hub.repository(one.spec.hub.repo, one.spec.name)
            full = name if "/" in name else f"{owner}/{name}"
            pushing.setdefault(full.lower(), []).append(one)  # the hub ignores case in names
    for alike in pushing.values():
        if len(alike) < 2 or all(one.is_done for one in alike):
            continue
        last = alike[-1]
        found = hub.repository(last.spec.hub.repo, last.spec.name)
        way = "give each its own"
        if last.source.swept:
            way = "take hub.repo out, and each run has a repository of its own name"
        yield last.source.fault(
            "hub.repo",
            f"{len(alike)} runs push to one repository (found {found!r}, for {list_some([one.spec.name for one in alike])}); {way}",
        )
