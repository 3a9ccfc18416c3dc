"""Durations, sizes, counts and lists as text for people."""

from __future__ import annotations

from collections.abc import Sequence


def format_duration(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    total = int(seconds + 0.5)
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_bytes(count: float) -> str:
    """In the unit that suits the size: "1.5 GiB", "20 MiB", "80 KiB"."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 or not count else f"{count / 2**10:.0f} KiB"


def pluralize(number: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def list_some(names: Sequence[str]) -> str:
    """The first five, separated by commas, and "..." if there are more."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def escape_unprintable(text: str) -> str:
    """With control characters and the like as escapes, so that a name from a file cannot move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
