"""`fluxrun check`: everything that can be known before the runs start, of all specs, in one report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from runner.base.files import cached_base
from runner.base.param_counts import parameter_counts
from runner.core import hub
from runner.core.errors import Fault
from runner.core.tracebacks import summary_line
from runner.jobs.job import Job
from runner.preflight.base_files import check_base_files
from runner.preflight.captions import check_captions
from runner.preflight.devices import check_devices
from runner.preflight.disk import check_disk, check_run_folder, check_runs_folder
from runner.preflight.finding import Finding, at, here, in_order
from runner.preflight.fingerprints import fingerprint_images
from runner.preflight.hub import check_access, check_push, check_wandb, hub_cache
from runner.preflight.images import check_images, pictures_of
from runner.preflight.libraries import check_libraries
from runner.preflight.tokenizers import CaptionReader
from runner.preflight.values import check_values

BaseKey = tuple[str, str | None, str | None]  # model.base, model.revision, model.variant


@dataclass
class BaseReport:
    """What is known of the bases that the jobs use.

    findings: what is wrong with them, once for each job that uses them. folders: of the bases whose files are complete
    on this disk. parameters: how many each part has, by model.base. download_bytes: to fetch before the runs start.
    """

    findings: list[Finding] = field(default_factory=list)
    folders: dict[BaseKey, Path] = field(default_factory=dict)
    parameters: dict[str, Mapping[str, int]] = field(default_factory=dict)
    download_bytes: int = 0


def check(jobs: Sequence[Job], faults: Sequence[Fault], runs: Path, gpus: str | None, slots: int = 1) -> list[Finding]:
    """All findings, the worst first.

    faults: for which the specs are refused anyway; they become errors. gpus, slots: as --gpus and --slots take them.
    """
    findings = [Finding("error", fault.message, fault.file, fault.line, fault.key) for fault in sorted(faults)]
    bases = _check_bases(jobs)
    findings += bases.findings
    fingerprints = fingerprint_images([picture for job in jobs for picture in pictures_of(job)])
    reader = cache(lambda base, encoder, entries: CaptionReader(base, encoder))
    for job in jobs:
        findings += [at(job.source, "warning", *doubt) for doubt in job.doubts]
        findings += _check_job(job, "data.source", lambda job: check_images(job, fingerprints))
        findings += _check_job(
            job, "data.source", lambda job: check_captions(job, bases.folders.get(_base_key(job)), reader)
        )
        findings += _check_job(job, "track.to", check_wandb)
        findings += _check_job(job, "train.lr", check_values)
    download = bases.download_bytes
    findings += _check_shared("the runs folder", lambda: check_runs_folder(runs))
    findings += _check_shared("the login", lambda: _check_pushes(jobs))
    findings += _check_shared("the devices", lambda: check_devices(jobs, bases.parameters, gpus, slots, runs))
    findings += _check_shared(
        "the disk", lambda: check_disk(jobs, runs, gpus, download, hub_cache() if download else None)
    )
    findings += _check_shared("the libraries", lambda: check_libraries(jobs))
    return in_order(findings)


def check_run_folders(jobs: Sequence[Job]) -> list[Finding]:
    """Runs that another queue works on now. (A queue reports them itself when it comes to them.)"""
    return [finding for job in jobs for finding in _check_job(job, "name", check_run_folder)]


def _check_job(job: Job, key: str, check_one: Callable[[Job], Iterable[Finding]]) -> list[Finding]:
    """The findings of one check of one job. A check that fails becomes a finding at `key`, and ends nothing."""
    try:
        return list(check_one(job))
    except Exception as error:
        file, line = job.source.location(key)
        # Not `at`, which would shorten the path of the traceback's file where that is below the spec's folder.
        return [Finding("warning", f"could not be checked: {summary_line(error)}", file, line, key)]


def _check_shared(subject: str, check_all: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check of what all jobs share; one that fails becomes a finding about `subject`."""
    try:
        return list(check_all())
    except Exception as error:
        return [here("warning", f"{subject} could not be checked: {summary_line(error)}")]


def _base_key(job: Job) -> BaseKey:
    model = job.spec.model
    return model.base, model.revision, model.variant


def _check_bases(jobs: Sequence[Job]) -> BaseReport:
    """Check each base once; what is wrong with it is found at each spec that names it."""
    report = BaseReport()
    checked: dict[BaseKey, list[Finding]] = {}
    for job in jobs:
        if job.faulty_keys & {"model", "model.base"}:
            continue
        key = _base_key(job)
        if key not in checked:
            checked[key] = _check_job(job, "model.base", lambda job: _check_base(job, report))
        report.findings += [at(job.source, finding.level, finding.key, finding.message) for finding in checked[key]]
    return report


def _check_base(job: Job, report: BaseReport) -> list[Finding]:
    """What is wrong with the job's base. Its folder, parameters and bytes to fetch go into the report."""
    model = job.spec.model
    report.parameters[model.base] = dict(parameter_counts(model.base, {}))  # stays if a check fails
    folder = cached_base(model.base, model.revision)
    messages, counts = check_base_files(folder, model.variant) if folder else ([], {})
    report.parameters[model.base] = dict(parameter_counts(model.base, counts))
    incomplete_download = bool(messages) and str(folder).startswith(str(hub_cache()))
    if folder is None or incomplete_download:  # the hub's client fetches what is missing
        findings, download_bytes = check_access(job, folder)
        report.download_bytes += download_bytes
        return findings
    report.folders[_base_key(job)] = folder
    return [at(job.source, "error", "model.base", message) for message in messages]


def _check_pushes(jobs: Sequence[Job]) -> Iterator[Finding]:
    pushing = [job for job in jobs if job.spec.hub.push and "hub.push" not in job.faulty_keys]
    login = hub.login() if pushing else hub.Login()
    for job in pushing:
        yield from check_push(job, login)
