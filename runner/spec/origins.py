"""A resolved spec as TOML that says behind each key where its value came from, and reading that again. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import tomli_w

from runner.spec.toml_lines import key_lines

DEFAULT = "default"
_COMMENT = re.compile(
    rf".*  # ({DEFAULT}$|(?:set|extended|sweep) .*)"
)  # the last one: a text or a file's name may hold such


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


def origins_in(text: str) -> dict[str, str]:
    """What `annotated` wrote behind each dotted key: "default", "set in FILE", "extended from FILE", "sweep in FILE".

    {} where no key is said to be a default: the file is from elsewhere, or it was written from a run's own copy, by a
    version that did not carry over what that one said, so that its comments tell nothing.
    """
    lines, found = text.split("\n"), {}
    for where, number in key_lines(text).items():
        if said := _COMMENT.match(lines[number - 1]):
            found[".".join(map(str, where))] = said[1]
    return found if DEFAULT in found.values() else {}


def _tables(value: list[Any]) -> bool:
    return all(isinstance(one, dict) for one in value)
