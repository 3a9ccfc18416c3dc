"""How long a run will take and how much memory, by what earlier runs in the runs folder took. No torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.prepare import Job
from runner.rundir import find_runs
from runner.spec import dump


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
class Time:
    """What one run of a night will take; seconds and peak are None where no earlier run is alike. about: the batch
    differed, and the time was taken to grow with it."""

    left: int
    s_per_step: float | None
    seconds: float | None
    peak: int | None
    about: bool


def times(jobs: Sequence[Job], runs: Path) -> list[Time]:
    """In the jobs' order. Alike is what has the same base, sizes, dtype and learning parts; the newest is taken."""
    known = _known(runs)
    out = []
    for job in jobs:
        own = dump(job.spec)
        left = steps_left(job)
        best = _best(known.get(_alike(own), ()), _images(own))
        if left == 0:
            out.append(Time(0, None, 0.0, None, False))
        elif best is None:
            out.append(Time(left, None, None, None, False))
        else:
            pace = best.s_per_step * _images(own) / best.images
            out.append(Time(left, pace, left * pace + best.beside, best.peak if best.exact else None, not best.exact))
    return out


def steps_left(job: Job) -> int:
    if job.verdict.state == "done":
        return 0
    at = max((step for step, _ in job.run.checkpoint_files()), default=0) if job.verdict.state == "resume" else 0
    return max(0, job.plan.steps - at)


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
        pace, steps = state.get("s_per_step"), state.get("step")
        if not isinstance(pace, int | float) or not isinstance(steps, int) or pace <= 0:
            continue
        try:
            tables = tomllib.loads(run.spec_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        whole = state.get("state") == "done" and state.get("attempts") == 1
        beside = max(0.0, float(state.get("wall_s") or 0) - pace * steps) if whole else 0.0
        peak = state.get("peak_memory_bytes")
        one = Pace(run.name, float(pace), beside, peak if isinstance(peak, int) else None, _images(tables), False)
        found.append((float(state.get("updated") or 0), _alike(tables), one))
    out: dict[str, list[Pace]] = {}
    for _, alike, one in sorted(found, key=lambda each: each[0]):
        out.setdefault(alike, []).append(one)
    return out


def _images(tables: Mapping[str, Any]) -> int:
    train = tables.get("train") or {}
    return max(1, int(train.get("batch_size", 1)) * int(train.get("accumulate", 1)))


def _alike(tables: Mapping[str, Any]) -> str:
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
            bool(tables.get("prior")),
            lora.get("until") == 0,
            (tables.get("compute") or {}).get("gpus"),
        ]
    )
