"""Nested TOML tables, and the dotted keys of what they hold: "lora.rank", "tokens.0.name"."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any


def flatten(tables: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables -> {"lora.rank": 16, ...}; lists stay values."""
    if not isinstance(tables, Mapping):
        return {prefix: tables}
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def dotted_keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Every key of nested tables, of arrays of tables too, and the keys of the tables themselves."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        items = enumerate(value)
    if prefix:
        yield prefix
    for key, inner in items:
        yield from dotted_keys(inner, f"{prefix}.{key}" if prefix else str(key))


def overlaps(key: str, other: str) -> bool:
    """Whether one of the two keys is the other, or is inside it."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def value_at(tables: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for part in key.split("."):
        if isinstance(tables, list):
            tables = tables[int(part)] if part.isdecimal() and int(part) < len(tables) else None
        else:
            tables = tables.get(part) if isinstance(tables, Mapping) else None
    return tables


def set_key(tables: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key; missing tables are made. Nothing is set inside a value that is no table."""
    *folders, last = key.split(".")
    table: Any = tables
    for folder in folders:
        table = table[int(folder)] if isinstance(table, list) else table.setdefault(folder, {})
        if not isinstance(table, dict | list):
            return
    table[int(last) if isinstance(table, list) else last] = value


def without_keys(tables: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A copy without these dotted keys. Entries of arrays go from the back, so that positions stay true."""
    rest = copy.deepcopy(dict(tables))
    for key in sorted(keys, key=lambda name: [int(p) if p.isdigit() else -1 for p in name.split(".")], reverse=True):
        *folders, last = key.split(".")
        table: Any = rest
        for folder in folders:
            table = _inner(table, folder)
        if isinstance(table, dict):
            table.pop(last, None)
        elif isinstance(table, list) and last.isdigit() and int(last) < len(table):
            del table[int(last)]
    return rest


def _inner(table: Any, name: str) -> Any:
    if isinstance(table, list):
        return table[int(name)] if name.isdigit() else {}
    return table.get(name, {}) if isinstance(table, dict) else {}


def is_written(key: str, tables: Any) -> bool:
    """Whether the dotted key is in the tables, or a value is in the place of a table around it."""
    for part in key.split("."):
        if isinstance(tables, list):
            tables = tables[int(part)] if part.isdigit() and int(part) < len(tables) else None
        elif isinstance(tables, Mapping):
            if part not in tables:
                return False
            tables = tables[part]
        else:
            return True
    return True
