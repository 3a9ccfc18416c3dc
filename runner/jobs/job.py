"""One run of a queue: its spec, where each value came from, what it reads, and its plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runner.data.images import Pictures
from runner.plan.phases import Plan
from runner.runs.run import Run, RunStatus
from runner.spec.loader import overlaps
from runner.spec.schema import Spec
from runner.spec.source import SpecOrigin as SpecSource


@dataclass(frozen=True)
class Seen:
    """One run asked for, as far as it could be looked at; None where something was wrong, or only the hub knows.

    `spec` has absolute paths; `bad`: its faulty keys; `unread`: those whose values could not be read, so that others, or
    defaults, stand in their place; `doubts`: (key, message) of what nobody could tell.
    """

    source: SpecSource
    spec: Spec
    bad: frozenset[str]
    pictures: Pictures | None
    plan: Plan | None
    run: Run
    verdict: RunStatus | None
    doubts: tuple[tuple[str, str], ...] = ()
    unread: frozenset[str] = frozenset()

    def knows(self, *keys: str) -> bool:
        """Whether the spec says of these keys what the user wrote."""
        return not any(overlaps(key, bad) for key in keys for bad in self.unread)


@dataclass(frozen=True)
class Job:
    """One run to be: its spec (paths absolute), plan and folder, and what the folder says of it."""

    file: Path
    spec: Spec
    plan: Plan
    pictures: Pictures | None  # None: a hub data set not fetched yet
    run: Run
    verdict: RunStatus
    source: SpecSource
    doubts: tuple[tuple[str, str], ...] = ()
