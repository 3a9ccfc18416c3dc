"""What a check found: how bad, about what, where it is written, what to do next. No torch."""

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
    """error: the run would fail or be wrong; warning: it will run, and is likely not what was meant; note: good to know.

    `fault` is what and where; where it is about the machine and no spec, its file is None. `more`: one line each; `also`: other
    places of which the same is found, as (file, line).
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
        """As the spec's faults are told, where it is about a spec."""
        return Fault(self.file, self.line or 1, self.key, self.message) if self.file else None

    def __str__(self) -> str:
        return f"{self.level}: {self.fault or escape_unprintable(self.message)}"

    def lines(self, most: int = 10) -> list[str]:
        """As told on a screen: the finding, then at most so many of its lines."""
        shown = self.more if len(self.more) <= most + 1 else (*self.more[:most], f"and {len(self.more) - most} more")
        same = [f"    {same_in(self.also)}"] if self.also else []
        return [str(self), *(f"    {escape_unprintable(line)}" for line in shown), *same]

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
    """About a key of a spec."""
    file, line = source.place(key)
    return Finding(level, source.relative(key, message), file, line, key, tuple(more))


def here(level: Level, message: str, more: Iterable[str] = ()) -> Finding:
    """About this machine, or its logins."""
    return Finding(level, message, more=tuple(more))


def in_order(found: Iterable[Finding]) -> list[Finding]:
    """The worst first, then as they were found; each once, with all the places where it was found."""
    together: dict[tuple[object, ...], list[Finding]] = {}
    for one in dict.fromkeys(found):
        together.setdefault((one.level, one.key, one.message, one.more, one.file is None), []).append(one)
    merged = [
        replace(first, also=tuple((one.file, one.line or 1) for one in rest if one.file)) if rest else first
        for first, *rest in together.values()
    ]
    return sorted(merged, key=lambda one: LEVELS.index(one.level))


def same_in(places: Sequence[tuple[Path, int]]) -> str:
    """Where else the same is to be mended."""
    return escape_unprintable(
        f"the same in {pluralize(len(places), 'more place')}: {list_some([f'{file}:{line}' for file, line in places])}"
    )
