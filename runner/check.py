"""`fluxrun check`: everything that can be known before the night, of all specs, in one report. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from runner.basefiles import cached_base
from runner.checkbase import check_base
from runner.checkdata import check_data, pictures_of
from runner.checkhere import check_devices, check_disk, check_libraries, numbers_of
from runner.checkhub import check_access, check_push, check_wandb, hub_cache, writable_names
from runner.checktext import check_text
from runner.errors import Fault
from runner.finding import Finding, at, in_order
from runner.looking import look_at
from runner.prepare import Job, Seen
from runner.readers import Reader


def check(seen: Sequence[Seen], faults: Sequence[Fault], runs: Path, gpus: str | None) -> list[Finding]:
    """The worst first. `faults`: what the specs are refused for anyway; `gpus`: as --gpus takes them."""
    found = [Finding("error", fault.message, fault.file, fault.line, fault.key) for fault in sorted(faults)]
    bases, numbers, download = _bases(seen, found)
    looks = look_at([picture for one in seen for picture in pictures_of(one)])
    reader = cache(lambda base, encoder, pieces: Reader(base, encoder))
    for one in seen:
        found += check_data(one, looks)
        found += check_text(one, bases.get(_base(one)), reader)
        found += check_wandb(one)
    found += _pushes(seen)
    found += check_devices(seen, numbers, gpus, runs)
    found += check_disk(seen, runs, download, hub_cache() if download else None)
    found += check_libraries(seen)
    return in_order(found)


def _base(seen: Seen) -> tuple[str, str | None, str | None]:
    own = seen.spec.model
    return own.base, own.revision, own.variant


def _bases(
    seen: Sequence[Seen], found: list[Finding]
) -> tuple[dict[tuple[str, str | None, str | None], Path], dict[str, dict[str, int]], int]:
    """(folder of each base, numbers in its parts, bytes to fetch); what is wrong is added to `found`."""
    folders: dict[tuple[str, str | None, str | None], Path] = {}
    numbers: dict[str, dict[str, int]] = {}
    looked: dict[tuple[str, str | None, str | None], Callable[[Seen], list[Finding]]] = {}
    download = 0
    for one in seen:
        key = _base(one)
        if "model.base" in one.bad or "model" in one.bad:
            continue
        if key not in looked:
            folder = cached_base(one.spec.model.base, one.spec.model.revision)
            told, counts = check_base(folder, one.spec.model.variant) if folder else ([], {})
            fetched = folder is None or (bool(told) and str(folder).startswith(str(hub_cache())))
            if folder and not (told and fetched):
                folders[key] = folder
            numbers[one.spec.model.base] = dict(numbers_of(one.spec.model.base, counts))
            if fetched:
                access, bytes_ = check_access(one, folder)
                download += bytes_
                looked[key] = _repeat(access)
            else:
                looked[key] = _as_told(told)
        found += looked[key](one)
    return folders, numbers, download


def _as_told(messages: Sequence[str]) -> Callable[[Seen], list[Finding]]:
    return lambda seen: [at(seen.source, "error", "model.base", message) for message in messages]


def _repeat(found: Sequence[Finding]) -> Callable[[Seen], list[Finding]]:
    """The same for another spec of the same base, at its own line."""
    return lambda seen: [at(seen.source, one.level, one.key, one.message) for one in found]


def _pushes(seen: Sequence[Seen]) -> Iterator[Finding]:
    pushing = [one for one in seen if one.spec.hub.push and one.spec.hub.repo and "hub.push" not in one.bad]
    names = writable_names() if pushing else set()
    for one in pushing:
        yield from check_push(one, names)


def seen_of(jobs: Sequence[Job]) -> list[Seen]:
    """What a queue is about to run, as a check takes it."""
    return [Seen(job.source, job.spec, frozenset(), job.pictures, job.plan, job.run, job.verdict) for job in jobs]
