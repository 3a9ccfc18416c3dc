"""One run of a queue: its spec, where each value came from, what it reads, and its plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runner.data.images import Pictures
from runner.plan.faults import KeyMessage
from runner.plan.phases import Plan
from runner.runs.run import Run
from runner.runs.status import RunStatus
from runner.spec.schema import Spec
from runner.spec.source import SpecOrigin
from runner.spec.tables import overlaps


@dataclass(frozen=True)
class Planned:
    """What a job has once nothing keeps it from being planned. status: what the run folder says of the plan."""

    plan: Plan
    status: RunStatus


@dataclass(frozen=True)
class Job:
    """One run asked for: where its spec came from, the spec (paths absolute), its folder and its images.

    pictures: None for a hub data set that is not on this disk, and for one that cannot be read. planned: None where
    something is wrong with the spec or what it names. doubts: (key, message) of what could not be checked. faulty_keys:
    dotted keys with a fault. unreadable_keys: those of them whose values could not be read, so that a default or a
    placeholder stands in `spec`.
    """

    source: SpecOrigin
    spec: Spec
    run: Run
    pictures: Pictures | None
    planned: Planned | None = None
    doubts: tuple[KeyMessage, ...] = ()
    faulty_keys: frozenset[str] = frozenset()
    unreadable_keys: frozenset[str] = frozenset()

    @property
    def file(self) -> Path:
        return self.source.file

    @property
    def plan(self) -> Plan:
        """Only of a job that is planned."""
        assert self.planned is not None
        return self.planned.plan

    @property
    def status(self) -> RunStatus:
        """Only of a job that is planned."""
        assert self.planned is not None
        return self.planned.status

    @property
    def is_done(self) -> bool:
        """Whether the run has been trained and exported as the spec asks."""
        return self.planned is not None and self.planned.status.state == "done"

    def was_read(self, *keys: str) -> bool:
        """Whether `spec` holds the user's own values of these keys."""
        return not any(overlaps(key, unreadable) for key in keys for unreadable in self.unreadable_keys)
