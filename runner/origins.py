"""A resolved spec as TOML that says behind each key where its value came from, and that read again. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tomli_w

from runner.tomllines import key_lines


def annotated(tables: Mapping[str, Any], origin: Callable[[str], str]) -> str:
    """TOML text of `tables`; `origin` of a dotted key ("tokens.0.name") is its comment."""
    arrays = {key: value for key, value in tables.items() if isinstance(value, list) and value and _tables(value)}
    text = tomli_w.dumps({key: value for key, value in tables.items() if key not in arrays})
    for key, each in arrays.items():  # on lines of their own, where tomli_w puts short ones into one
        text += "".join(f"\n[[{key}]]\n{tomli_w.dumps(one)}" for one in each)
    lines = text.split("\n")
    for where, number in key_lines(text).items():
        inner: Any = tables
        for part in where:
            inner = inner[part]
        if not isinstance(inner, dict):
            said = origin(".".join(map(str, where)))
            lines[number - 1] += "  # " + "".join(c if c.isprintable() else "?" for c in said)
    return "\n".join(lines)


KINDS = ("default", "set in ", "extended from ", "sweep in ")


def read_origins(text: str) -> dict[str, str]:
    """The origins in what `annotated` wrote, by dotted key; a line that was written by hand since has none."""
    lines = text.split("\n")
    found = {}
    for where, number in key_lines(text).items():
        _, mark, said = lines[number - 1].rpartition("  # ")
        if mark and said.startswith(KINDS):
            found[".".join(map(str, where))] = said
    return found


def _tables(value: list[Any]) -> bool:
    return all(isinstance(one, dict) for one in value)
