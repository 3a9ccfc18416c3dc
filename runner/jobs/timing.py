"""How long a run will take and how much memory, by what earlier runs took: in the runs folder, or else on this machine. No torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.core import hardware
from runner.jobs import timing_store
from runner.jobs.job import Job
from runner.runs.run import find_runs
from runner.runs.state import RunState
from runner.spec.schema import dump


@dataclass(frozen=True)
class Pace:
    """Of one earlier run. beside: seconds that were no training (encoding, export), where they can be told; images: per
    step; exact: of the very batch asked for."""

    run: str
    s_per_step: float
    beside: float
    peak: int | None
    images: int
    exact: bool


@dataclass(frozen=True)
class TimeEstimate:
    """What one run of a night will take; seconds and peak are None where no earlier run is alike. about: the batch
    differed, and the time was taken to grow with it."""

    left: int
    s_per_step: float | None
    seconds: float | None
    peak: int | None
    about: bool


def estimate_times(jobs: Sequence[Job], runs: Path, *, on_gpu: bool = True) -> list[TimeEstimate]:
    """In the jobs' order. Alike is what has the same base, sizes, dtype and learning parts; the newest is taken. Where no
    run in the folder is alike, what this machine's book has of such steps on the same kind of device."""
    known, machine = _known(runs), _Machine(jobs, on_gpu)
    out = []
    for job in jobs:
        own = dump(job.spec)
        left = steps_left(job)
        best = _best(known.get(_comparable(own)) or machine.paces(own), _images(own))
        if left == 0:
            out.append(TimeEstimate(0, None, 0.0, None, False))
        elif best is None:
            out.append(TimeEstimate(left, None, None, None, False))
        else:
            pace = best.s_per_step * _images(own) / best.images
            out.append(
                TimeEstimate(left, pace, left * pace + best.beside, best.peak if best.exact else None, not best.exact)
            )
    return out


def steps_left(job: Job) -> int:
    if job.is_done:
        return 0
    if job.status.state not in ("resume", "running", "waiting"):
        return job.plan.steps
    state = job.run.state()
    if state.ended:  # early: what is left is the export
        return 0
    saved = max((step for step, _ in job.run.checkpoint_files()), default=0)
    return max(0, job.plan.steps - (int(state.step or 0) if job.status.state == "running" else saved))


def _best(found: Sequence[Pace], images: int) -> Pace | None:
    exact = [one for one in found if one.images == images]
    if exact:
        return Pace(**{**vars(exact[-1]), "exact": True})
    return found[-1] if found else None


def _known(runs: Path) -> dict[str, list[Pace]]:
    """The paces of the runs that are there, the oldest first."""
    found: list[tuple[float, str, Pace]] = []
    for run in find_runs(runs):
        state = run.state()
        try:
            tables = tomllib.loads(run.spec_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if one := _pace(run.name, tables, state):
            found.append((state.updated or 0.0, _comparable(tables), one))
    out: dict[str, list[Pace]] = {}
    for _, alike, one in sorted(found, key=lambda each: each[0]):
        out.setdefault(alike, []).append(one)
    return out


def _pace(name: str, tables: Mapping[str, Any], state: RunState) -> Pace | None:
    """What one run's state tells, None where it has no time of a step."""
    pace, steps, peak = state.s_per_step, state.step, state.peak_memory_bytes
    if pace is None or not isinstance(steps, int) or pace <= 0:
        return None
    whole = state.state == "done" and state.attempts == 1
    beside = max(0.0, (state.wall_s or 0.0) - pace * steps) if whole else 0.0
    return Pace(name, float(pace), beside, peak if isinstance(peak, int) else None, _images(tables), False)


def _images(tables: Mapping[str, Any]) -> int:
    train = tables.get("train") or {}
    return max(1, int(train.get("batch_size", 1)) * int(train.get("accumulate", 1)))


class _Machine:
    """What the machine's book tells of jobs; it is read at the first question."""

    def __init__(self, jobs: Sequence[Job], on_gpu: bool) -> None:
        self.jobs, self.on_gpu = jobs, on_gpu

    @cached_property
    def entries(self) -> dict[str, list[dict[str, Any]]]:
        return timing_store.read_entries()

    @cached_property
    def names(self) -> tuple[str, dict[str, str]]:
        return hardware.device_name(on_gpu=self.on_gpu), timing_store.jobs_on(self.jobs)

    def paces(self, tables: Mapping[str, Any]) -> list[Pace]:
        """Of the same resolution; of several, the mean of each one's, since they take turns."""
        if not self.entries:
            return []
        sides = tables["data"]["resolution"]
        sides = sides if isinstance(sides, list) else [sides]
        found = [self._of(tables, side) for side in sides]
        if not all(found):
            return self._of(tables, tables["data"]["resolution"])
        if len(found) == 1:
            return found[0]
        firsts = [_best(one, _images(tables)) for one in found]
        means = [one for one in firsts if one is not None]
        if len({one.images for one in means}) != 1:
            return []
        mean = sum(one.s_per_step for one in means) / len(means)
        return [Pace("", mean, max(one.beside for one in means), None, means[0].images, False)]

    def _of(self, tables: Mapping[str, Any], resolution: object) -> list[Pace]:
        device, bases = self.names
        key = book_key(device, bases[tables["model"]["base"]], tables, resolution)
        return [
            Pace("", row["s_per_step"], row["beside"], row.get("peak"), row["images"], False)
            for row in self.entries.get(key, ())
        ]


def remember_timing(jobs: Sequence[Job], *, on_gpu: bool) -> None:
    """Put into the machine's book what these runs took, those of them that are done."""
    device, bases = hardware.device_name(on_gpu=on_gpu), timing_store.jobs_on(jobs)
    rows = {}
    for job in jobs:
        tables, state = dump(job.spec), job.run.state()
        if state.state == "done" and (pace := _pace(job.run.name, tables, state)):
            key = book_key(device, bases[job.spec.model.base], tables, tables["data"]["resolution"])
            row = {"images": pace.images, "s_per_step": pace.s_per_step, "beside": pace.beside, "peak": pace.peak}
            rows[key] = {name: value for name, value in row.items() if value is not None}
    timing_store.store(rows)


def book_key(device: str, base: str, tables: Mapping[str, Any], resolution: object) -> str:
    here = {**tables, "model": {**tables["model"], "base": None}, "data": {**tables["data"], "resolution": resolution}}
    return timing_store.entry_key(device, base, _comparable(here))


def _comparable(tables: Mapping[str, Any]) -> str:
    """What two runs must share for their steps to take about the same time, as one text."""
    model, data = tables.get("model") or {}, tables.get("data") or {}
    lora, inversion = tables.get("lora") or {}, tables.get("inversion") or {}
    model_keys = (
        "base",
        "dtype",
        "quantize",
        "gradient_checkpointing",
        "attention",
        "offload",
        "compile",
        "max_sequence_length",
    )
    return repr(
        [
            *(model.get(key) for key in model_keys),
            data.get("resolution"),
            bool(data.get("buckets")),
            inversion.get("encoders") if tables.get("tokens") else None,
            bool(tables.get("text_lora")),
            *([inversion["gradient_checkpointing"]] if inversion.get("gradient_checkpointing") is not None else []),
            bool(tables.get("prior")),
            lora.get("until") == 0,
            (tables.get("compute") or {}).get("gpus"),
        ]
    )
