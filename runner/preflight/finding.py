"""What a check found: how severe it is, which key of which file it is about, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from runner.core.errors import Fault
from runner.core.humanize import escape_unprintable, list_some, pluralize
from runner.spec.source import SpecOrigin

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One finding. error: the run would fail or be wrong. warning: it runs, but likely not as meant. note: good to
    know.

    file, line, key: where in a spec; None and "" where it is about the machine. more: details, a line each. also: other
    places with the same finding, as (file, line).
    """

    level: Level
    message: str
    file: Path | None = None
    line: int | None = None
    key: str = ""
    more: tuple[str, ...] = ()
    also: tuple[tuple[Path, int], ...] = ()

    @property
    def fault(self) -> Fault | None:
        """The finding as a fault of its spec; None where it is about the machine."""
        return Fault(self.file, self.line or 1, self.key, self.message) if self.file else None

    def __str__(self) -> str:
        return f"{self.level}: {self.fault or escape_unprintable(self.message)}"

    def lines(self, most: int = 10) -> list[str]:
        """For the terminal: the finding, then at most `most` of its details, then the other places."""
        shown = self.more if len(self.more) <= most + 1 else (*self.more[:most], f"and {len(self.more) - most} more")
        others = [f"    {format_places(self.also)}"] if self.also else []
        return [str(self), *(f"    {escape_unprintable(line)}" for line in shown), *others]

    def as_json(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "file": str(self.file) if self.file else None,
            "line": self.line,
            "key": self.key or None,
            "message": self.message,
            "more": list(self.more),
            "also": [{"file": str(file), "line": line} for file, line in self.also],
        }


def at(source: SpecOrigin, level: Level, key: str, message: str, more: Iterable[str] = ()) -> Finding:
    """A finding about a key of a spec. Paths in the message are shown relative to the spec's folder."""
    file, line = source.location(key)
    return Finding(level, source.relative(key, message), file, line, key, tuple(more))


def here(level: Level, message: str, more: Iterable[str] = ()) -> Finding:
    """A finding about this machine or its logins."""
    return Finding(level, message, more=tuple(more))


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, otherwise in their order. Equal findings at several places become one."""
    equal: dict[tuple[object, ...], list[Finding]] = {}
    for finding in dict.fromkeys(findings):
        content = (finding.level, finding.key, finding.message, finding.more, finding.file is None)
        equal.setdefault(content, []).append(finding)
    merged = [
        replace(first, also=tuple((other.file, other.line or 1) for other in others if other.file)) if others else first
        for first, *others in equal.values()
    ]
    return sorted(merged, key=lambda finding: LEVELS.index(finding.level))


def format_places(places: Sequence[tuple[Path, int]]) -> str:
    """A line that names other places with the same finding."""
    return escape_unprintable(
        f"the same in {pluralize(len(places), 'more place')}: {list_some([f'{file}:{line}' for file, line in places])}"
    )
