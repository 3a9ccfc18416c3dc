"""Step times measured on this machine, so that plans in a new runs folder have estimates.

One JSON file in the user's cache folder ($XDG_CACHE_HOME/fluxrun/pace.json). Errors while reading or writing it are
ignored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.base.param_counts import read_base_configs
from runner.core import files, locks
from runner.core.errors import LockHeldError
from runner.core.files import read_json
from runner.core.user_cache import user_cache
from runner.jobs.job import Job
from runner.runs.state import is_number

FORMAT = 1
MAX_ENTRIES = 500  # the oldest are dropped

Row = Mapping[
    str, Any
]  # "images" per step, "s_per_step", "beside" (seconds outside steps), "at"; perhaps "peak" in bytes


def store_path() -> Path:
    return user_cache() / "pace.json"


def base_name(base: str) -> str:
    """A name that bases of one shape share, whatever they are called and wherever they are: their steps take the same
    time."""
    configs = read_base_configs(base)
    if configs is None:
        return base
    parts = {name: sum(counts) for name, counts in configs.parameters.items()}
    return json.dumps([parts, configs.transformer["num_layers"], configs.transformer["num_single_layers"]])


def base_names(jobs: Iterable[Job]) -> dict[str, str]:
    """`base_name` of each base of the jobs, each read once."""
    return {base: base_name(base) for base in {job.spec.model.base for job in jobs}}


def entry_key(device: str, base: str, comparable: str) -> str:
    return json.dumps([device, base, comparable])


def read_entries() -> dict[str, list[dict[str, Any]]]:
    """By `entry_key`: a row for each number of images per step, the newest last. Damaged rows are left out."""
    content: dict[str, Any] = {}
    with suppress(OSError):
        content = read_json(store_path())
    entries = content.get("entries") if content.get("format") == FORMAT else None
    if not isinstance(entries, dict):
        return {}
    return {key: [row for row in rows if _is_valid(row)] for key, rows in entries.items() if isinstance(rows, list)}


def _is_valid(row: object) -> bool:
    names = ("images", "s_per_step", "beside", "at")
    return isinstance(row, dict) and all(is_number(row.get(name)) for name in names) and row["s_per_step"] > 0


def store(rows: Mapping[str, Row]) -> None:
    """Add a row to the entry of each key; it replaces one with as many images per step."""
    if not rows:
        return
    path = store_path()
    with suppress(OSError, LockHeldError):
        files.make_folder(path.parent)
        with locks.hold_lock(path.with_name(".pace.lock")):
            entries = read_entries()
            for key, row in rows.items():
                others = [other for other in entries.get(key, ()) if other["images"] != row["images"]]
                entries[key] = [*others, {**row, "at": time.time()}]
            files.write_json(path, {"format": FORMAT, "entries": _newest(entries)}, durable=False)


def _newest(entries: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    oldest_first = sorted(entries, key=lambda key: max((row["at"] for row in entries[key]), default=0.0))
    return {key: list(entries[key]) for key in oldest_first[-MAX_ENTRIES:]}
