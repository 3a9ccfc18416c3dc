"""The parts of TOML that messages about broken TOML tell apart, and tomllib's errors with their line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

KEY = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*"""
ASSIGNMENT = re.compile(rf"\s*(?P<key>{KEY})\s*=(?P<value>.*)")
HEADER = re.compile(r"\s*(?P<open>\[\[?)\s*(?P<name>[A-Za-z_\"'][^\]#]*?)\s*(?P<close>\]*)\s*(?:#.*)?$")
LONGEST_SHOWN = 80  # characters of a text that a message shows


@dataclass(frozen=True)
class ParseError:
    """Where tomllib stopped, line and column counted from 1, and its reason."""

    line: int
    column: int
    reason: str


def parse_error(lines: Sequence[str]) -> ParseError | None:
    """None where the lines are TOML."""
    try:
        tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError as error:
        reason = re.sub(r" \(at [^()]*\)$", "", str(error))
        if place := re.search(r"\(at line (\d+), column (\d+)\)$", str(error)):
            return ParseError(int(place[1]), int(place[2]), reason)
        return ParseError(len(lines), len(lines[-1]) + 1, reason)
    except ValueError as error:  # from int() itself, for thousands of digits
        longest = max(range(len(lines)), key=lambda at: max(map(len, re.findall(r"\d+", lines[at])), default=0))
        return ParseError(longest + 1, 1, str(error))
    return None


def is_value(text: str) -> bool:
    """Whether the text is one TOML value."""
    return parse_error([f"a = {text}"]) is None


def without_comment(text: str) -> str:
    """The text before a # that is outside of quotes."""
    before = re.match(r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|[^"'#])*""", text)
    return before[0].rstrip() if before and before[0].strip() else text.rstrip()


def got(text: str) -> str:
    """The text as a message shows what it found."""
    text = text.strip()
    return f"got `{text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + '...'}`"


def heading(name: str) -> str:
    """Of a table."""
    return "[[tokens]]" if name == "tokens" else f"[{name}]"
