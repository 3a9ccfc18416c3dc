"""How long a run will take and how much memory, from earlier runs: of the runs folder, or else of this machine."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.core import hardware
from runner.jobs import timing_store
from runner.jobs.job import Job
from runner.runs.run import find_runs
from runner.runs.state import RunState
from runner.spec.schema import dump

# What two runs must share for their steps to take about the same time, besides the keys of `_comparable_key`.
MODEL_KEYS = (
    "base",
    "dtype",
    "quantize",
    "gradient_checkpointing",
    "attention",
    "offload",
    "compile",
    "max_sequence_length",
)


@dataclass(frozen=True)
class StepTime:
    """How long a step of an earlier run took. overhead_s: seconds spent outside training steps (encoding, export); 0
    where not known. peak: bytes. images: per step. exact: the batch is the one asked for."""

    s_per_step: float
    overhead_s: float
    peak: int | None
    images: int
    exact: bool = False


@dataclass(frozen=True)
class TimeEstimate:
    """What a job will take. steps_left: steps. seconds, peak (bytes): None where no earlier run is
    comparable. is_scaled: the earlier run had another batch, and its time was scaled to this one."""

    steps_left: int
    s_per_step: float | None
    seconds: float | None
    peak: int | None
    is_scaled: bool

    def as_json(self) -> dict[str, Any]:
        """As `plan --json` prints it."""
        return {
            "left": self.steps_left,
            "s_per_step": self.s_per_step,
            "seconds": self.seconds,
            "peak": self.peak,
            "about": self.is_scaled,
        }


def estimate_times(jobs: Sequence[Job], runs: Path, *, on_gpu: bool = True) -> list[TimeEstimate]:
    """In the jobs' order. Taken from the newest comparable run in the folder (same base, sizes, dtype and trained
    parts), or else from this machine's stored times on the same kind of device."""
    in_folder, stored = _step_times_in(runs), _StoredTimes(jobs, on_gpu)
    estimates = []
    for job in jobs:
        tables = dump(job.spec)
        images, left = _images_per_step(tables), steps_left(job)
        nearest = _nearest(in_folder.get(_comparable_key(tables)) or stored.step_times(tables), images)
        if left == 0:
            estimates.append(TimeEstimate(0, None, 0.0, None, False))
        elif nearest is None:
            estimates.append(TimeEstimate(left, None, None, None, False))
        else:
            s_per_step = nearest.s_per_step * images / nearest.images
            seconds = left * s_per_step + nearest.overhead_s
            peak = nearest.peak if nearest.exact else None
            estimates.append(TimeEstimate(left, s_per_step, seconds, peak, not nearest.exact))
    return estimates


def steps_left(job: Job) -> int:
    if job.is_done:
        return 0
    if job.status.state not in ("resume", "running", "waiting"):
        return job.plan.steps
    state = job.run.state()
    if state.ended:  # training ended early, so only the export is left
        return 0
    reached = int(state.step or 0) if job.status.state == "running" else job.run.newest_step()
    return max(0, job.plan.steps - reached)


def remember_timing(jobs: Sequence[Job], *, on_gpu: bool) -> None:
    """Store the times of those jobs that are done for later plans on this machine."""
    device, bases = hardware.device_name(on_gpu=on_gpu), timing_store.base_names(jobs)
    rows = {}
    for job in jobs:
        tables, state = dump(job.spec), job.run.state()
        if state.state == "done" and (time := _step_time(tables, state)):
            key = stored_key(device, bases[job.spec.model.base], tables, tables["data"]["resolution"])
            row = {"images": time.images, "s_per_step": time.s_per_step, "beside": time.overhead_s, "peak": time.peak}
            rows[key] = {name: value for name, value in row.items() if value is not None}
    timing_store.store(rows)


def _nearest(times: Sequence[StepTime], images: int) -> StepTime | None:
    """The newest with as many images per step, or else the newest."""
    exact = [time for time in times if time.images == images]
    if exact:
        return replace(exact[-1], exact=True)
    return times[-1] if times else None


def _step_times_in(runs: Path) -> dict[str, list[StepTime]]:
    """Of the runs in a folder, by `_comparable_key`, the oldest first."""
    found: list[tuple[float, str, StepTime]] = []
    for run in find_runs(runs):
        state = run.state()
        try:
            tables = tomllib.loads(run.spec_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if time := _step_time(tables, state):
            found.append((state.updated or 0.0, _comparable_key(tables), time))
    by_key: dict[str, list[StepTime]] = {}
    for _, key, time in sorted(found, key=lambda each: each[0]):
        by_key.setdefault(key, []).append(time)
    return by_key


def _step_time(tables: Mapping[str, Any], state: RunState) -> StepTime | None:
    """From a run's spec and state; None where it has not timed a step."""
    s_per_step, steps, peak = state.s_per_step, state.step, state.peak_memory_bytes
    if s_per_step is None or not isinstance(steps, int) or s_per_step <= 0:
        return None
    in_one_go = state.state == "done" and state.attempts == 1
    overhead_s = max(0.0, (state.wall_s or 0.0) - s_per_step * steps) if in_one_go else 0.0
    return StepTime(float(s_per_step), overhead_s, peak if isinstance(peak, int) else None, _images_per_step(tables))


def _images_per_step(tables: Mapping[str, Any]) -> int:
    train = tables.get("train") or {}
    return max(1, int(train.get("batch_size", 1)) * int(train.get("accumulate", 1)))


class _StoredTimes:
    """This machine's stored times for jobs. The store is read when the first job needs it."""

    def __init__(self, jobs: Sequence[Job], on_gpu: bool) -> None:
        self.jobs, self.on_gpu = jobs, on_gpu

    @cached_property
    def entries(self) -> dict[str, list[dict[str, Any]]]:
        return timing_store.read_entries()

    @cached_property
    def device(self) -> str:
        return hardware.device_name(on_gpu=self.on_gpu)

    @cached_property
    def bases(self) -> dict[str, str]:
        return timing_store.base_names(self.jobs)

    def step_times(self, tables: Mapping[str, Any]) -> list[StepTime]:
        """Of the same resolution. For a spec with several resolutions, which take turns, the mean over single ones, or
        else the times of the same list."""
        if not self.entries:
            return []
        resolution = tables["data"]["resolution"]
        sides = resolution if isinstance(resolution, list) else [resolution]
        by_side = [self._at(tables, side) for side in sides]
        if not all(by_side):
            return self._at(tables, resolution)
        if len(by_side) == 1:
            return by_side[0]
        chosen = [time for times in by_side if (time := _nearest(times, _images_per_step(tables)))]
        if len({time.images for time in chosen}) != 1:
            return []
        mean = sum(time.s_per_step for time in chosen) / len(chosen)
        return [StepTime(mean, max(time.overhead_s for time in chosen), None, chosen[0].images)]

    def _at(self, tables: Mapping[str, Any], resolution: object) -> list[StepTime]:
        key = stored_key(self.device, self.bases[tables["model"]["base"]], tables, resolution)
        return [
            StepTime(row["s_per_step"], row["beside"], row.get("peak"), row["images"])
            for row in self.entries.get(key, ())
        ]


def stored_key(device: str, base: str, tables: Mapping[str, Any], resolution: object) -> str:
    """Of the times of a spec's steps on a device. base: `timing_store.base_name`, which replaces the path in the
    spec."""
    changed = {
        **tables,
        "model": {**tables["model"], "base": None},
        "data": {**tables["data"], "resolution": resolution},
    }
    return timing_store.entry_key(device, base, _comparable_key(changed))


def _comparable_key(tables: Mapping[str, Any]) -> str:
    """Equal for runs whose steps take about the same time."""
    model, data = tables.get("model") or {}, tables.get("data") or {}
    lora, inversion = tables.get("lora") or {}, tables.get("inversion") or {}
    return repr(
        [
            *(model.get(key) for key in MODEL_KEYS),
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
