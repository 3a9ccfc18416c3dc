"""How long a step took on this machine, kept beside the runs folders: so a plan in a new one knows times, too. No torch.

One JSON file in the user's cache folder ($XDG_CACHE_HOME/fluxrun/pace.json). It is a courtesy: one that cannot be read or
written is done without.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.base.param_counts import read_base_configs
from runner.core import files, locks
from runner.core.errors import LockHeldError
from runner.core.files import read_json
from runner.jobs.job import Job
from runner.runs.state import is_number

FORMAT = 1
MOST = 500  # entries; the oldest go


def store_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fluxrun" / "pace.json"


def base_name(base: str) -> str:
    """Bases of one shape take the same time, whatever they are called and wherever they are."""
    shapes = read_base_configs(base)
    if shapes is None:
        return base
    parts = {name: sum(numbers) for name, numbers in shapes.parameters.items()}
    return json.dumps([parts, shapes.transformer["num_layers"], shapes.transformer["num_single_layers"]])


def entry_key(device: str, base: str, alike: str) -> str:
    return json.dumps([device, base, alike])


def read_entries() -> dict[str, list[dict[str, Any]]]:
    """What is kept: by `entry_key` a row for each number of images per step, the newest last."""
    found: dict[str, Any] = {}
    with suppress(OSError):
        found = read_json(store_path())
    entries = found.get("entries") if found.get("format") == FORMAT else None
    if not isinstance(entries, dict):
        return {}
    return {
        key: [row for row in rows if _whole(row)]
        for key, rows in entries.items()
        if isinstance(rows, list)
    }  # fmt: skip


def _whole(row: object) -> bool:
    wanted = ("images", "s_per_step", "beside", "at")
    return isinstance(row, dict) and all(is_number(row.get(name)) for name in wanted) and row["s_per_step"] > 0


def store(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Add a row to each key, in place of one for as many images."""
    if not rows:
        return
    path = store_path()
    with suppress(OSError, LockHeldError):
        files.make_folder(path.parent)
        with locks.hold_lock(path.with_name(".pace.lock")):
            entries = read_entries()
            for key, row in rows.items():
                others = [one for one in entries.get(key, ()) if one["images"] != row["images"]]
                entries[key] = [*others, {**row, "at": time.time()}]
            files.write_json(path, {"format": FORMAT, "entries": _newest(entries)}, durable=False)


def _newest(entries: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    oldest_first = sorted(entries, key=lambda key: max((row["at"] for row in entries[key]), default=0.0))
    return {key: list(entries[key]) for key in oldest_first[-MOST:]}


def jobs_on(jobs: Iterable[Job]) -> dict[str, str]:
    """The name of each base that jobs ask for, told once."""
    return {base: base_name(base) for base in {job.spec.model.base for job in jobs}}
