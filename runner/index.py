"""The results index: one record per run, derived from the run folders, rewritten whole. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from runner import files
from runner.rundir import find_runs


@dataclass(frozen=True)
class Record:
    """One run. Times: seconds since 1970; wall_s: all attempts together; losses: smoothed; memory in bytes;
    export_error: the largest of any exported file (state.json has each); warning: what went wrong and cost nothing;
    ended: by which rule training ended early; split: parts that a micro-batch was cut into because it did not fit into the memory."""

    name: str
    state: str
    spec_digest: str | None = None
    started: float | None = None
    finished: float | None = None
    wall_s: float | None = None
    steps: int | None = None
    s_per_step: float | None = None
    peak_memory_bytes: int | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    exports: list[str] = field(default_factory=list)
    base: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    best_step: int | None = None
    ended: str | None = None
    attempts: int | None = None
    split: int | None = None
    export_error: float | None = None
    warning: str | None = None


def results(runs: Path) -> list[Record]:
    """Every run below `runs`, by name."""
    records = []
    for run in find_runs(runs):
        state = run.state()
        known = {key: value for key, value in state.items() if key in Record.__dataclass_fields__}
        records.append(Record(**{**known, "name": run.name}))
    return records


def write_index(runs: Path) -> None:
    lines = [json.dumps(asdict(record), sort_keys=True) for record in results(runs)]
    files.write_text(runs / "index.jsonl", "".join(line + "\n" for line in lines))
