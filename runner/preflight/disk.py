"""Whether the disk has room for the runs, and whether the runs folder can be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from runner.core import hardware
from runner.core.errors import LockHeldError
from runner.core.humanize import format_bytes, pluralize
from runner.jobs.disk_need import queue_bytes
from runner.jobs.job import Job
from runner.jobs.prepare import planned_jobs
from runner.plan.disk import SPARE
from runner.preflight.finding import Finding, at, here

# ---- disk ----------------------------------------------------------------------------------------------------------


def check_disk(
    seen: Sequence[Job], runs: Path, gpus: str | None, download: int = 0, hub_cache: Path | None = None
) -> Iterator[Finding]:
    """What all runs will write against what is free. gpus: as --gpus takes them; `download`: bytes of bases that come into
    `hub_cache`."""
    jobs = [job for job in planned_jobs(seen) if not job.is_done]
    folders, cached = queue_bytes(jobs, on_gpu=gpus != "cpu" and hardware.NVIDIA.is_dir())
    disk = _existing(runs)
    free = shutil.disk_usage(disk).free
    with_base = download if hub_cache and _same_disk(_existing(hub_cache), disk) else 0
    need = folders + cached + with_base
    if jobs and need + SPARE > free:
        base = f", {format_bytes(with_base)} for the base's files" if with_base else ""
        ways = ["free some space"]
        ways += ["lower checkpoint.keep"] if any(job.spec.checkpoint.keep > 1 for job in jobs) else []
        ways += ["queue fewer specs"] if len(jobs) > 1 else []
        yield here(
            "error",
            f"disk: the night wants about {format_bytes(need + SPARE)} ({format_bytes(folders)} in {pluralize(len(jobs), 'run folder')}, "
            f"{format_bytes(cached)} in the cache{base}, {format_bytes(SPARE)} to spare beside a checkpoint), and {runs} has room for "
            f"{format_bytes(free)}; {' or '.join(ways)}",
        )
    elif jobs:
        yield here(
            "note",
            f"disk: about {format_bytes(need)} will be written, {format_bytes(SPARE)} must stay free beside it, {format_bytes(free)} are free",
        )
    if hub_cache and download and not with_base and download > (room := shutil.disk_usage(_existing(hub_cache)).free):
        yield here(
            "error",
            f"disk: the base's files take {format_bytes(download)}, and {hub_cache} has room for {format_bytes(room)}; free some space, or "
            "set HF_HOME to a larger disk",
        )


def check_runs_folder(runs: Path) -> Iterator[Finding]:
    there = _existing(runs)
    if not os.access(there, os.W_OK | os.X_OK):
        yield here(
            "error",
            f"{runs} cannot be written: {there} may not be changed by this user; name another folder with --runs",
        )


def check_folder(seen: Job) -> Iterator[Finding]:
    """Whether another queue has the run's folder."""
    if seen.planned is None or seen.is_done:
        return
    try:
        seen.run.refuse_if_locked()
    except LockHeldError as error:
        yield at(seen.source, "warning", "name", f"{error}; a queue leaves this run out")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.resolve()
    return next(one for one in (path, *path.parents) if one.exists())


def _same_disk(one: Path, other: Path) -> bool:
    return os.stat(one).st_dev == os.stat(other).st_dev
