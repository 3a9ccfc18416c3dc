"""The line of each key of a TOML text, which tomllib does not tell. Only for text that tomllib can parse."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping

KeyPath = tuple[str | int, ...]

_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
_DOTTED = rf"{_KEY}(?:[ \t]*\.[ \t]*{_KEY})*"
_TOKEN = re.compile(
    r'''(?P<string>"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\')'''
    r"|(?P<comment>\#[^\n]*)|(?P<open>[\[{])|(?P<close>[\]}])|(?P<newline>\n)",
    re.DOTALL,
)
_BARE = re.compile(r"[A-Za-z0-9_. \t-]+")
_HEADER = re.compile(rf"[ \t]*(?P<open>\[\[?)[ \t]*(?P<key>{_DOTTED})[ \t]*\]\]?")
_ASSIGNMENT = re.compile(rf"[ \t]*(?P<key>{_DOTTED})[ \t]*=")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Key path -> line, counted from 1: ("tokens", 0, "name") -> 12. Keys inside inline tables get their table's line
    from `line_of`."""
    text = text.replace("\r\n", "\n")
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, statement in _statements(text):
        if header := _HEADER.match(statement):
            table = _in_arrays(_parts(header["key"]), counts, new=header["open"] == "[[")
            lines.setdefault(table, number)
            if header["open"] == "[[":
                lines.setdefault(table[:-1], number)  # the whole array has its first table's line
        elif assignment := _ASSIGNMENT.match(statement):
            path = table + _parts(assignment["key"])
            for length in range(len(table) + 1, len(path) + 1):
                lines.setdefault(path[:length], number)
    return lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line of a key, else of the nearest table around it, else 1."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return 1


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each statement: the text between newlines that are outside of strings and brackets. The time is
    proportional to the length of the text."""
    line, start, depth = 1, 0, 0
    for token in _TOKEN.finditer(text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth -= 1
        elif token["newline"] and depth == 0:
            statement = text[start : token.start()]
            yield line, statement
            line += statement.count("\n") + 1
            start = token.end()
    yield line, text[start:]


def _parts(dotted: str) -> KeyPath:
    """`a."b.c"` -> ("a", "b.c"), with the help of tomllib where there are quotes."""
    if _BARE.fullmatch(dotted):
        return tuple(part.strip() for part in dotted.split("."))
    value = tomllib.loads(f"{dotted} = 0")
    path: list[str | int] = []
    while isinstance(value, dict):
        key, value = next(iter(value.items()))
        path.append(key)
    return tuple(path)


def _in_arrays(path: KeyPath, counts: dict[KeyPath, int], *, new: bool) -> KeyPath:
    """The path with the current index after each part that is an array of tables. new: the last part begins a table of
    its array."""
    indexed: KeyPath = ()
    for position, part in enumerate(path):
        indexed += (part,)
        if new and position == len(path) - 1:
            counts[indexed] = counts.get(indexed, -1) + 1
        if indexed in counts:
            indexed += (counts[indexed],)
    return indexed
