"""Whether the libraries that the specs need are installed, in versions that fluxrun was made for."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from runner.jobs.job import Job
from runner.preflight.finding import Finding, at, here
from runner.spec.attention import PACKAGES

SHOWN = ("fluxrun", "torch", "diffusers", "transformers", "peft")  # whose versions a note lists


def check_libraries(jobs: Sequence[Job]) -> Iterator[Finding]:
    """fluxrun's own requirements, the optional ones of each spec, and versions that changed since a run was started."""
    from packaging.requirements import Requirement

    for job in jobs:
        yield from _optional_libraries(job)
    for text in requires("fluxrun") or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, installed = requirement.name, version_of(requirement.name)
        if not installed:
            yield here("error", f"{name} is not installed, and fluxrun needs {requirement}; install fluxrun again")
        elif not requirement.specifier.contains(installed, prereleases=True):
            yield here("warning", f"{name} {installed} is not what fluxrun was made for, which is {requirement}")
    versions = {"python": platform.python_version()} | {name: version_of(name) for name in SHOWN}
    for job in jobs:
        yield from _changed_versions(job, versions)
    yield here("note", "versions: " + ", ".join(f"{name} {installed}" for name, installed in versions.items()))


def _optional_libraries(job: Job) -> Iterator[Finding]:
    if job.spec.optimizer.name == "adamw8bit" and find_spec("bitsandbytes") is None:
        yield at(
            job.source, "error", "optimizer.name",
            'adamw8bit needs bitsandbytes, which is not installed; pip install "fluxrun[bitsandbytes]"',
        )  # fmt: skip
    if job.spec.model.quantize == "nf4" and find_spec("bitsandbytes") is None:
        yield at(
            job.source, "error", "model.quantize",
            'nf4 needs bitsandbytes, which is not installed; pip install "fluxrun[bitsandbytes]", or use int8 or fp8, which need '
            "nothing",
        )  # fmt: skip
    package, requirement = PACKAGES.get(job.spec.model.attention, ("torch", ""))
    if find_spec(package) is None:
        yield at(
            job.source, "error", "model.attention",
            f'{job.spec.model.attention} needs {package}, which is not installed; pip install "{requirement}", or use "native"',
        )  # fmt: skip
    if "wandb" in job.spec.track.to and find_spec("wandb") is None:
        yield at(job.source, "error", "track.to", 'wandb is not installed; pip install "fluxrun[wandb]"')


def _changed_versions(job: Job, versions: Mapping[str, str]) -> Iterator[Finding]:
    """A run that is resumed with other libraries than it was started with does not end with the same bytes."""
    if job.planned is None or job.status.state != "resume":
        return
    started_with = job.run.state().versions or {}
    changed = [
        f"{name} {old} -> {versions[name]}"
        for name, old in started_with.items()
        if name in versions and versions[name] != old
    ]
    if changed:
        yield at(
            job.source, "warning", "name",
            f"{job.run.folder} was begun with other libraries ({', '.join(changed)}); it goes on, but not to the same bytes",
        )  # fmt: skip


def version_of(name: str) -> str:
    """The installed version of a package; "" where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
