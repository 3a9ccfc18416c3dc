"""The comments of a run folder's spec.toml, which say where each value came from: writing and reading them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import tomli_w

from runner.spec.toml_lines import key_lines

DEFAULT = "default"
# The last one of a line: a text or the name of a file may contain such a comment itself.
_COMMENT = re.compile(rf".*  # ({DEFAULT}$|(?:set|extended|sweep) .*)")


def annotated(tables: Mapping[str, Any], origin: Callable[[str], str]) -> str:
    """TOML text of `tables`. origin: the comment after a dotted key ("tokens.0.name")."""
    arrays = {key: value for key, value in tables.items() if isinstance(value, list) and value and _are_tables(value)}
    text = tomli_w.dumps({key: value for key, value in tables.items() if key not in arrays})
    for key, array in arrays.items():  # on lines of their own; tomli_w writes short ones on one line
        text += "".join(f"\n[[{key}]]\n{tomli_w.dumps(table)}" for table in array)
    lines = text.split("\n")
    for path, number in key_lines(text).items():
        value: Any = tables
        for part in path:
            value = value[part]
        if not isinstance(value, dict):
            comment = origin(".".join(map(str, path)))
            lines[number - 1] += "  # " + "".join(c if c.isprintable() else "?" for c in comment)
    return "\n".join(lines)


def origins_in(text: str) -> dict[str, str]:
    """The comment of each dotted key: "default", "set in FILE", "extended from FILE" or "sweep in FILE".

    {} where no key is a default. The file is then not fluxrun's, or was written by a version that lost the comments of
    the run folder's spec that it was queued from; what its comments say is of no use.
    """
    lines, origins = text.split("\n"), {}
    for path, number in key_lines(text).items():
        if comment := _COMMENT.match(lines[number - 1]):
            origins[".".join(map(str, path))] = comment[1]
    return origins if DEFAULT in origins.values() else {}


def _are_tables(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)
