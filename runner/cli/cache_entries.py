"""The entries of a runs folder's shared cache: what there is, and removing what was not used lately.

An entry can always be computed again from what its name hashes, so removing one costs only time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from runner.cache.paths import cache_folder
from runner.core import files
from runner.core.errors import LockHeldError
from runner.core.humanize import pluralize
from runner.runs.run import find_runs

DAY = 86400.0  # seconds


@dataclass(frozen=True)
class CacheKind:
    """The entries of one kind: latents, text embeddings of one encoder, quantised weights, or views (the list of
    latents that a data set comes to). bytes: on disk; oldest, newest: days since an entry was last used."""

    kind: str
    entries: int
    bytes: int
    oldest: float
    newest: float


def list_kinds(runs: Path) -> list[CacheKind]:
    now, kinds = time.time(), []
    for folder in sorted(path for path in cache_folder(runs).glob("*") if path.is_dir()):
        stats = [path.stat() for path in _entries(folder, "*/*")]
        if stats:
            days = [max(0.0, now - stat.st_mtime) / DAY for stat in stats]
            size = sum(stat.st_size for stat in stats)
            kinds.append(CacheKind(folder.name, len(stats), size, max(days), min(days)))
    return kinds


def prune(runs: Path, days: float) -> tuple[int, int]:
    """Remove entries that were not used for `days`. Returns how many, and their bytes.

    Raises LockHeldError while a queue works on `runs`: it may be about to read one of them.
    """
    if busy := next((holder for run in find_runs(runs) if (holder := run.holder())), None):
        raise LockHeldError(
            f"process {busy.pid} is working on {runs} and may be about to read its cache; wait for it, or stop it"
        )
    limit, entries, size = time.time() - days * DAY, 0, 0
    for path in _entries(cache_folder(runs), "*/*/*"):
        stat = path.stat()
        if stat.st_mtime < limit:
            path.unlink()
            entries, size = entries + 1, size + stat.st_size
    for path in _cache_files(cache_folder(runs), f"*/*/.*{files.PARTIAL_SUFFIX}"):
        path.unlink()
    return entries, size


def kinds_table(kinds: list[CacheKind]) -> Table:
    table = Table(box=box.SIMPLE)
    for title in ("kind", "entries", "size", "last used"):
        table.add_column(title)
    for kind in kinds:
        last_used = _days_ago(round(kind.newest), round(kind.oldest))
        table.add_row(kind.kind, f"{kind.entries:,}", f"{kind.bytes / 2**20:,.1f} MiB", last_used)
    total = sum(kind.bytes for kind in kinds)
    table.add_row("all", f"{sum(kind.entries for kind in kinds):,}", f"{total / 2**20:,.1f} MiB", "")
    return table


def kinds_as_json(kinds: list[CacheKind]) -> dict[str, Any]:
    return {"kinds": [asdict(kind) for kind in kinds], "bytes": sum(kind.bytes for kind in kinds)}


def _entries(folder: Path, pattern: str) -> list[Path]:
    return [path for suffix in ("safetensors", "json") for path in _cache_files(folder, f"{pattern}.{suffix}")]


def _cache_files(folder: Path, pattern: str) -> Iterator[Path]:
    """Files named KIND/12/12ab..., as the cache names its entries. Other files are never listed or removed: earlier
    versions allowed a run to be named `cache`."""
    for path in folder.glob(pattern):
        key = path.name.lstrip(".").partition(".")[0]
        is_entry = re.fullmatch("[0-9a-f]{64}", key) and path.parent.name == key[:2]
        if is_entry and path.is_file() and not path.is_symlink():
            yield path


def _days_ago(newest: int, oldest: int) -> str:
    """In days: "today", "3 days ago", "today to 40 days ago"."""
    first, last = ("today" if days == 0 else f"{pluralize(days, 'day')} ago" for days in (newest, oldest))
    return first if first == last else f"{first if newest == 0 else newest} to {last}"
