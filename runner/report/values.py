"""How values of runs are written in tables and on the results page."""

from __future__ import annotations

from typing import Any

from runner.core.humanize import format_duration
from runner.runs.index import Record

MAX_VALUE = 24  # characters of a spec's value in a column; `results --csv` and the page's details have all of it


def spec_text(value: Any) -> str:
    """A spec's value as in TOML, without quotes; "" for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(spec_text, value)) if isinstance(value, list) else str(value)


def is_long(text: str) -> bool:
    """Whether a spec's value is a path, an address, a command or the like, which is shown after the numbers."""
    return "/" in text or len(text) > MAX_VALUE


def steps_text(record: Record) -> str:
    """ "700", or "300/700" if the run is not done."""
    if record.state == "done":
        return whole_text(record.steps)
    return f"{whole_text(record.step or 0)}/{whole_text(record.steps) or '?'}"


def number_text(value: float | None, form: str) -> str:
    """`form`: a format specification such as ".4f"."""
    return "" if value is None else format(value, form)


def whole_text(value: float | None) -> str:
    return number_text(value, ".0f")


def duration_text(seconds: float | None) -> str:
    return format_duration(seconds) if seconds else ""
