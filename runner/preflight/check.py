"""`fluxrun check`: everything that can be known before the night, of all specs, in one report. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from runner.base.files import cached_base
from runner.base.param_counts import parameter_counts
from runner.core import hub
from runner.core.errors import Fault
from runner.core.tracebacks import summary_line
from runner.jobs.job import Job
from runner.preflight.base_files import check_base
from runner.preflight.captions import check_text
from runner.preflight.devices import check_devices
from runner.preflight.disk import check_disk, check_folder, check_runs_folder
from runner.preflight.finding import Finding, at, here, in_order
from runner.preflight.fingerprints import fingerprint_image
from runner.preflight.hub import check_access, check_push, check_wandb, hub_cache
from runner.preflight.images import check_data, pictures_of
from runner.preflight.libraries import check_libraries
from runner.preflight.tokenizers import CaptionReader
from runner.preflight.values import check_values


def check(seen: Sequence[Job], faults: Sequence[Fault], runs: Path, gpus: str | None, slots: int = 1) -> list[Finding]:
    """The worst first. `faults`: what the specs are refused for anyway; `gpus`, `slots`: as a queue takes them."""
    found = [Finding("error", fault.message, fault.file, fault.line, fault.key) for fault in sorted(faults)]
    bases, numbers, download = _bases(seen, found)
    looks = fingerprint_image([picture for one in seen for picture in pictures_of(one)])
    reader = cache(lambda base, encoder, pieces: CaptionReader(base, encoder))
    for one in seen:
        found += [at(one.source, "warning", *doubt) for doubt in one.doubts]
        found += _of_one(one, "data.source", lambda one: check_data(one, looks))
        found += _of_one(one, "data.source", lambda one: check_text(one, bases.get(_base(one)), reader))
        found += _of_one(one, "track.to", check_wandb)
        found += _of_one(one, "train.lr", check_values)
    found += _of_all("the runs folder", lambda: check_runs_folder(runs))
    found += _of_all("the login", lambda: _pushes(seen))
    found += _of_all("the devices", lambda: check_devices(seen, numbers, gpus, slots, runs))
    found += _of_all("the disk", lambda: check_disk(seen, runs, gpus, download, hub_cache() if download else None))
    found += _of_all("the libraries", lambda: check_libraries(seen))
    return in_order(found)


def check_folders(seen: Sequence[Job]) -> list[Finding]:
    """Runs that another queue has at the moment. A queue says so itself when it comes to them."""
    return [found for one in seen for found in _of_one(one, "name", check_folder)]


def _of_one(seen: Job, key: str, look: Callable[[Job], Iterable[Finding]]) -> list[Finding]:
    """What `look` finds of one run. Where it fails itself, that is a finding: it ends neither the check nor the queue."""
    try:
        return list(look(seen))
    except Exception as error:
        file, line = seen.source.place(key)  # whose folder the traceback's path has nothing to do with
        return [Finding("warning", f"could not be checked: {summary_line(error)}", file, line, key)]


def _of_all(what: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The same of what all runs share."""
    try:
        return list(look())
    except Exception as error:
        return [here("warning", f"{what} could not be checked: {summary_line(error)}")]


def _base(seen: Job) -> tuple[str, str | None, str | None]:
    own = seen.spec.model
    return own.base, own.revision, own.variant


def _bases(
    seen: Sequence[Job], found: list[Finding]
) -> tuple[dict[tuple[str, str | None, str | None], Path], dict[str, dict[str, int]], int]:
    """(folder of each base, numbers in its parts, bytes to fetch); what is wrong is added to `found`."""
    folders: dict[tuple[str, str | None, str | None], Path] = {}
    numbers: dict[str, dict[str, int]] = {}
    looked: dict[tuple[str, str | None, str | None], list[Finding]] = {}
    download = 0
    for one in seen:
        key = _base(one)
        if "model.base" in one.faulty_keys or "model" in one.faulty_keys:
            continue
        if key not in looked:

            def look(one: Job, key: tuple[str, str | None, str | None] = key) -> list[Finding]:
                nonlocal download
                told, bytes_ = _look_at_base(one, key, folders, numbers)
                download += bytes_
                return told

            looked[key] = _of_one(one, "model.base", look)
        # of another spec with the same base at its own line
        found += [at(one.source, told.level, told.key, told.message) for told in looked[key]]
    return folders, numbers, download


def _look_at_base(
    one: Job, key: tuple[str, str | None, str | None], folders: dict[tuple[str, str | None, str | None], Path],
    numbers: dict[str, dict[str, int]],
) -> tuple[list[Finding], int]:  # fmt: skip
    """(what is wrong, bytes to fetch); what is known of it goes into `folders` and `numbers`."""
    own = one.spec.model
    numbers[own.base] = dict(parameter_counts(own.base, {}))
    folder = cached_base(own.base, own.revision)
    told, counts = check_base(folder, own.variant) if folder else ([], {})
    fetched = folder is None or (bool(told) and str(folder).startswith(str(hub_cache())))
    if folder and not (told and fetched):
        folders[key] = folder
    numbers[own.base] = dict(parameter_counts(own.base, counts))
    if fetched:
        return check_access(one, folder)
    return [at(one.source, "error", "model.base", message) for message in told], 0


def _pushes(seen: Sequence[Job]) -> Iterator[Finding]:
    pushing = [one for one in seen if one.spec.hub.push and "hub.push" not in one.faulty_keys]
    login = hub.login() if pushing else hub.Login()
    for one in pushing:
        yield from check_push(one, login)
