"""`fluxrun cache`: what the shared cache holds, and letting go of what nobody asked for in a while. No torch.

Nothing is lost with an entry but the time to make it again: it is a function of what it is named by.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from runner.core import files
from runner.core.errors import LockHeldError
from runner.runs.run import find_runs

DAY = 86400.0


@dataclass(frozen=True)
class Kind:
    """Entries of one kind: latents, text embeddings by encoder, quantised models, or views: which latents a data set comes
    to. bytes: on the disk; oldest, newest: days since they were last asked for."""

    kind: str
    entries: int
    bytes: int
    oldest: float
    newest: float


def listing(runs: Path) -> list[Kind]:
    now, found = time.time(), []
    for folder in sorted(path for path in (runs / "cache").glob("*") if path.is_dir()):
        facts = [path.stat() for path in _entries(folder, "*/*")]
        if facts:
            days = [max(0.0, now - fact.st_mtime) / DAY for fact in facts]
            found.append(Kind(folder.name, len(facts), sum(fact.st_size for fact in facts), max(days), min(days)))
    return found


def prune(runs: Path, days: float) -> tuple[int, int]:
    """Remove what was not asked for in `days`: (entries, bytes). Raises LockHeldError while a queue works, which may be about to."""
    if busy := next((holder for run in find_runs(runs) if (holder := run.holder())), None):
        raise LockHeldError(
            f"process {busy.pid} is working on {runs}, and may be about to read its cache; wait for it, or stop it"
        )
    limit, entries, size = time.time() - days * DAY, 0, 0
    for path in _entries(runs / "cache", "*/*/*"):
        fact = path.stat()
        if fact.st_mtime < limit:
            path.unlink()
            entries, size = entries + 1, size + fact.st_size
    for path in _own(runs / "cache", f"*/*/.*{files.PARTIAL_SUFFIX}"):
        path.unlink()
    return entries, size


def as_table(kinds: list[Kind]) -> Table:
    from rich import box

    table = Table(box=box.SIMPLE)
    for title in ("kind", "entries", "size", "last used"):
        table.add_column(title)
    for one in kinds:
        table.add_row(
            one.kind, f"{one.entries:,}", f"{one.bytes / 2**20:,.1f} MiB", _ago(round(one.newest), round(one.oldest))
        )
    total = sum(one.bytes for one in kinds)
    table.add_row("all", f"{sum(one.entries for one in kinds):,}", f"{total / 2**20:,.1f} MiB", "")
    return table


def as_json(kinds: list[Kind]) -> dict[str, Any]:
    return {"kinds": [asdict(one) for one in kinds], "bytes": sum(one.bytes for one in kinds)}


def _entries(folder: Path, pattern: str) -> list[Path]:
    return [path for end in ("safetensors", "json") for path in _own(folder, f"{pattern}.{end}")]


def _own(folder: Path, pattern: str) -> Iterator[Path]:
    """Files named KIND/12/12ab..., as the cache names its own. Nothing else goes, whatever lies there: an earlier fluxrun
    took `cache` for a run's name."""
    for path in folder.glob(pattern):
        key = path.name.lstrip(".").partition(".")[0]
        named = re.fullmatch("[0-9a-f]{64}", key) and path.parent.name == key[:2]
        if named and path.is_file() and not path.is_symlink():
            yield path


def _ago(newest: int, oldest: int) -> str:
    """In days: "today", "3 days ago", "today to 40 days ago"."""
    first, last = ("today" if days == 0 else f"{days} day{'' if days == 1 else 's'} ago" for days in (newest, oldest))
    return first if first == last else f"{first if newest == 0 else newest} to {last}"
