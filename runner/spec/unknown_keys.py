"""Keys that a spec does not have, and what each was probably meant for."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from runner.spec.keys import keys_allowed, spec_keys
from runner.spec.other_trainers import NO_KEY, NOT_THERE, PROGRAMS, named_by
from runner.spec.toml_lines import KeyPath


def show_value(value: Any) -> str:
    """A value as found, short, with control characters escaped."""
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_key_faults(
    path: KeyPath, value: Any, tables: Mapping[str, Any], written: Mapping[str, Any], swept: Collection[str] = ()
) -> tuple[str, tuple[str, ...]]:
    """(message, the keys that were probably meant) for a key that is not allowed where it is.

    tables: the spec with its defaults; written: as the user wrote it; swept: the keys that [sweep] sets. For those no
    value is shown, so that all runs of a sweep have the same message; and the key that was meant may be set already, as
    a sweep overrides it.
    """
    allowed = sorted(keys_allowed(path[:-1], tables))
    is_table = isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping))
    is_swept = ".".join(map(str, path)) in swept
    shown = f"{path[-1]} in [sweep]" if is_swept else f"{path[-1]} = {show_value(value)}"
    text = f"unknown {'table' if is_table else 'key'}, got {shown}; allowed here: {', '.join(allowed)}"
    advice, meant = _probably_meant(path, allowed)
    if len(meant) == 1 and (meant[0] in swept if is_swept else _is_set(meant[0], written)):
        advice = f"{meant[0]} is already set, so remove this one"
    return f"{text}; {advice}" if advice else text, meant


def _probably_meant(path: KeyPath, allowed: list[str]) -> tuple[str, tuple[str, ...]]:
    """(advice, the keys that it names): first what is certain, then names that are only similar."""
    name = str(path[-1])
    table = [str(part) for part in path[:-1] if not isinstance(part, int)]
    if reason := NOT_THERE.get(".".join([*table, name])):
        return f"{reason}; remove this key", ()
    if near := difflib.get_close_matches(name.lower(), allowed, 1, 0.75):
        return _did_you_mean_here(path, near[0])
    if named := named_by(name):
        return _did_you_mean_there(name, *named)
    if reason := NO_KEY.get(name):
        return f"no key here does this ({reason}); remove it", ()
    if elsewhere := [key for key in spec_keys() if key.rpartition(".")[2] == name]:
        return f"{_where(name, elsewhere)}; write it there", tuple(elsewhere)
    if near := difflib.get_close_matches(name, allowed, 1, 0.6):
        return _did_you_mean_here(path, near[0])
    last_parts = {key.rpartition(".")[2]: key for key in spec_keys()}
    if near := difflib.get_close_matches(name, list(last_parts), 1, 0.75):
        key = last_parts[near[0]]
        return f"did you mean {_as_written(key)}?", (key,)
    foreign = {foreign for names in PROGRAMS.values() for foreign in names}
    if (near := difflib.get_close_matches(name, sorted(foreign), 1, 0.85)) and (named := named_by(near[0])):
        return _did_you_mean_there(near[0], *named)
    return "", ()


def _did_you_mean_here(path: KeyPath, name: str) -> tuple[str, tuple[str, ...]]:
    key = ".".join([*map(str, path[:-1]), name])
    return f"did you mean {_as_written(key)}?", (key,)


def _did_you_mean_there(name: str, program: str, line: str) -> tuple[str, tuple[str, ...]]:
    """Of another program's name. line: what it is here, as in `other_trainers.PROGRAMS`."""
    key = line.partition(" = ")[0].strip("[]")
    explained = "" if line.rpartition(".")[2] == name else f", which {program} calls {name}"
    return f"did you mean {_as_written(line)}{explained}?", (key,)


def _where(name: str, keys: list[str]) -> str:
    if keys == [name]:
        return f"[{name}] is a table at the top level" if _is_table(name) else f"{name} belongs above all tables"
    return f"{name} is a key of {' or '.join(_as_written(key.rpartition('.')[0]) for key in keys)}"


def _as_written(key: str) -> str:
    """The key, or its table's heading."""
    return "[[tokens]]" if key == "tokens" else f"[{key}]" if _is_table(key) else key


def _is_table(key: str) -> bool:
    return key in spec_keys() and spec_keys()[key].is_table


def _is_set(key: str, tables: Any) -> bool:
    """Whether it is set to a value; a table is none."""
    for part in key.split("."):
        if not isinstance(tables, Mapping) or part not in tables:
            return False
        tables = tables[part]
    return not isinstance(tables, Mapping)
