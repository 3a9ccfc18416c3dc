"""`lease.json`: which process may start and write to a run, fenced by the number of the attempt."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from runner.core import files
from runner.core.files import read_json
from runner.core.process_identity import Process
from runner.runs.state import FORMAT

REMOTE_TIMEOUT = 600.0  # seconds without a change of state after which another host's process is taken for dead


@dataclass(frozen=True)
class Lease:
    """holder: the process that has the run, if any. attempt: counts up with every new attempt, so that the process of
    an earlier one can tell that its lease is over."""

    attempt: int
    holder: Process | None


def read_lease(path: Path) -> Lease:
    """Attempt 0 without a holder where there is no file, or something else in it."""
    content = read_json(path)
    attempt = content.get("attempt")
    return Lease(attempt if isinstance(attempt, int) else 0, Process.from_json(content.get("holder")))


def write_lease(path: Path, lease: Lease) -> None:
    holder = lease.holder.as_json() if lease.holder else None
    files.write_json(path, {"format": FORMAT, "attempt": lease.attempt, "holder": holder})


def live_holder(lease_file: Path, state_file: Path) -> Process | None:
    """The holder, unless it is dead. A process of another host counts as alive as long as it updates the state."""
    holder = read_lease(lease_file).holder
    if holder is None or (holder.is_local and not holder.is_alive):
        return None
    if not holder.is_local and time.time() - _last_change(state_file, lease_file) > REMOTE_TIMEOUT:
        return None
    return holder


def _last_change(*paths: Path) -> float:
    """Seconds since 1970; 0 where there is none of the files."""
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)
