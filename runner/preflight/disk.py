"""Whether the disk has room for the runs, whether the runs folder can be written, and whether a run is in use."""

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


def check_disk(
    jobs: Sequence[Job], runs: Path, gpus: str | None, download: int = 0, hub_cache: Path | None = None
) -> Iterator[Finding]:
    """Compare what all jobs will write with what is free.

    gpus: as --gpus takes them. download: bytes of bases that will be fetched into `hub_cache`.
    """
    waiting = [job for job in planned_jobs(jobs) if not job.is_done]
    folders, cached = queue_bytes(waiting, on_gpu=gpus != "cpu" and hardware.NVIDIA.is_dir())
    disk = _existing_folder(runs)
    free = shutil.disk_usage(disk).free
    base = download if hub_cache and _same_disk(_existing_folder(hub_cache), disk) else 0
    needed = folders + cached + base
    if waiting and needed + SPARE > free:
        run_folders = pluralize(len(waiting), "run folder")
        parts = [f"{format_bytes(folders)} in {run_folders}", f"{format_bytes(cached)} in the cache"]
        parts += [f"{format_bytes(base)} for the base's files"] if base else []
        remedies = ["free some space"]
        remedies += ["lower checkpoint.keep"] if any(job.spec.checkpoint.keep > 1 for job in waiting) else []
        remedies += ["queue fewer specs"] if len(waiting) > 1 else []
        yield here(
            "error",
            f"disk: the runs need about {format_bytes(needed + SPARE)} ({', '.join(parts)}, {format_bytes(SPARE)} that must "
            f"stay free), and {runs} has room for {format_bytes(free)}; {' or '.join(remedies)}",
        )
    elif waiting:
        yield here(
            "note",
            f"disk: about {format_bytes(needed)} will be written, {format_bytes(SPARE)} more must stay free, "
            f"{format_bytes(free)} are free",
        )
    if hub_cache and download and not base:
        room = shutil.disk_usage(_existing_folder(hub_cache)).free
        if download > room:
            yield here(
                "error",
                f"disk: the base's files take {format_bytes(download)}, and {hub_cache} has room for {format_bytes(room)}; "
                "free some space, or set HF_HOME to a larger disk",
            )


def check_runs_folder(runs: Path) -> Iterator[Finding]:
    """Whether the runs folder can be written or created."""
    folder = _existing_folder(runs)
    if not os.access(folder, os.W_OK | os.X_OK):
        yield here(
            "error",
            f"{runs} cannot be written: this user may not write in {folder}; name another folder with --runs",
        )


def check_run_folder(job: Job) -> Iterator[Finding]:
    """Whether another queue works on the run."""
    if job.planned is None or job.is_done:
        return
    try:
        job.run.refuse_if_locked()
    except LockHeldError as error:
        yield at(job.source, "warning", "name", f"{error}; a queue leaves this run out")


def _existing_folder(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _same_disk(first: Path, second: Path) -> bool:
    return os.stat(first).st_dev == os.stat(second).st_dev
