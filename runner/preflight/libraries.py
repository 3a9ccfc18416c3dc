"""Whether the libraries that the specs need are installed, and in tested versions."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from runner.jobs.job import Job
from runner.preflight.finding import Finding, at, here
from runner.spec.attention import PACKAGES

# ---- libraries -----------------------------------------------------------------------------------------------------


def check_libraries(seen: Sequence[Job]) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    for one in seen:
        yield from _optional(one)
    for text in requires("fluxrun") or ():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = version_of(wanted.name)
        if not found:
            yield here("error", f"{wanted.name} is not installed, and fluxrun needs {wanted}; install fluxrun again")
        elif not wanted.specifier.contains(found, prereleases=True):
            yield here("warning", f"{wanted.name} {found} is not what fluxrun was made for, which is {wanted}")
    now = {"python": platform.python_version()} | {name: version_of(name) for name in SHOWN}
    for one in seen:
        yield from _drifted(one, now)
    yield here("note", "versions: " + ", ".join(f"{name} {found}" for name, found in now.items()))


SHOWN = ("fluxrun", "torch", "diffusers", "transformers", "peft")


def _optional(seen: Job) -> Iterator[Finding]:
    if seen.spec.optimizer.name == "adamw8bit" and find_spec("bitsandbytes") is None:
        yield at(
            seen.source, "error", "optimizer.name",
            'adamw8bit needs bitsandbytes, which is not installed; pip install "fluxrun[bitsandbytes]"',
        )  # fmt: skip
    if seen.spec.model.quantize == "nf4" and find_spec("bitsandbytes") is None:
        yield at(
            seen.source, "error", "model.quantize",
            'nf4 needs bitsandbytes, which is not installed; pip install "fluxrun[bitsandbytes]", or use int8 or fp8, which need '
            "nothing",
        )  # fmt: skip
    package, wanted = PACKAGES.get(seen.spec.model.attention, ("torch", ""))
    if find_spec(package) is None:
        yield at(
            seen.source, "error", "model.attention",
            f'{seen.spec.model.attention} needs {package}, which is not installed; pip install "{wanted}", or use "native"',
        )  # fmt: skip
    if "wandb" in seen.spec.track.to and find_spec("wandb") is None:
        yield at(seen.source, "error", "track.to", 'wandb is not installed; pip install "fluxrun[wandb]"')


def _drifted(seen: Job, now: Mapping[str, str]) -> Iterator[Finding]:
    """A run that goes on under other libraries than it was begun with does not end with the same bytes."""
    if seen.planned is None or seen.status.state != "resume":
        return
    then = seen.run.state().versions or {}
    changed = [f"{name} {old} -> {now[name]}" for name, old in then.items() if name in now and now[name] != old]
    if changed:
        yield at(
            seen.source, "warning", "name",
            f"{seen.run.folder} was begun with other libraries ({', '.join(changed)}); it goes on, but not to the same bytes",
        )  # fmt: skip


def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
