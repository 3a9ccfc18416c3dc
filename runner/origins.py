"""A resolved spec as TOML that says behind each key where its value came from. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tomli_w

from runner.tomllines import key_lines


def annotated(tables: Mapping[str, Any], origin: Callable[[str], str]) -> str:
    """TOML text of `tables`; `origin` of a dotted key ("tokens.0.name") is its comment."""
    text = tomli_w.dumps(tables)
    lines = text.split("\n")
    for where, number in key_lines(text).items():
        inner: Any = tables
        for part in where:
            inner = inner[part]
        if not isinstance(inner, dict):
            said = origin(".".join(map(str, where)))
            lines[number - 1] += "  # " + "".join(c if c.isprintable() else "?" for c in said)
    return "\n".join(lines)
