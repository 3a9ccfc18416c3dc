"""Keys that a spec does not have: what each was likely meant for."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from runner.spec.keys import Where, keys_of, models_in, spec_keys
from runner.spec.other_trainers import NO_KEY, NOT_THERE, PROGRAMS, named_by


def show_value(value: Any) -> str:
    """A value as found, short, with control characters escaped."""
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_key_faults(
    path: Where, value: Any, tables: Mapping[str, Any], written: Mapping[str, Any], swept: Collection[str] = ()
) -> tuple[str, tuple[str, ...]]:
    """(message, the keys that were meant) of a key that is not allowed where it stands. tables: the spec with its
    defaults; written: as the user wrote it; swept: the keys that stand in [sweep]. Of those no value is shown, so that
    the runs of a sweep have the same message, and the key that was meant may be set: the sweep overrides it."""
    here = sorted(keys_of(path[:-1], tables))
    is_table = isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping))
    is_swept = ".".join(map(str, path)) in swept
    written_as = f"{path[-1]} in [sweep]" if is_swept else f"{path[-1]} = {show_value(value)}"
    text = f"unknown {'table' if is_table else 'key'}, got {written_as}; allowed here: {', '.join(here)}"
    why, meant = _what_was_meant(path, here)
    for key in meant:
        if len(meant) == 1 and (key in swept if is_swept else _is_set(key, written)):
            why = f"{key} is already set, so remove this one"
    return f"{text}; {why}" if why else text, meant


def _what_was_meant(path: Where, here: list[str]) -> tuple[str, tuple[str, ...]]:
    """(advice, the keys it names)."""
    wrong, table = str(path[-1]), [str(part) for part in path[:-1] if not isinstance(part, int)]
    within = [str(part) for part in path[:-1]]
    everywhere = list(spec_keys())
    if reason := NOT_THERE.get(".".join([*table, wrong])):
        return f"{reason}; remove this key", ()
    if near := difflib.get_close_matches(wrong.lower(), here, 1, 0.75):
        key = ".".join([*within, near[0]])
        return f"did you mean {_line(key)}?", (key,)
    if named := named_by(wrong):
        program, key = named
        told = "" if key.rpartition(".")[2] == wrong else f", which {program} calls {wrong}"
        return f"did you mean {_line(key)}{told}?", (_key_in(key),)
    if reason := NO_KEY.get(wrong):
        return f"no key here does this ({reason}); remove it", ()
    same = [key for key in everywhere if key.rpartition(".")[2] == wrong]
    if same:
        return f"{_where(wrong, same)}; write it there", tuple(same)
    if near := difflib.get_close_matches(wrong, here, 1, 0.6):
        key = ".".join([*within, near[0]])
        return f"did you mean {_line(key)}?", (key,)
    last_parts = {key.rpartition(".")[2]: key for key in everywhere}
    if near := difflib.get_close_matches(wrong, list(last_parts), 1, 0.75):
        return f"did you mean {_line(last_parts[near[0]])}?", (last_parts[near[0]],)
    foreign = {name for names in PROGRAMS.values() for name in names}
    if near := difflib.get_close_matches(wrong, sorted(foreign), 1, 0.85):
        program, key = named_by(near[0]) or ("", "")
        return f"did you mean {_line(key)}, which {program} calls {near[0]}?", (_key_in(key),)
    return "", ()


def _where(name: str, keys: list[str]) -> str:
    if keys == [name]:
        return f"[{name}] is a table at the top level" if _is_table(name) else f"{name} belongs above all tables"
    return f"{name} is a key of {' or '.join(_line(key.rpartition('.')[0]) for key in keys)}"


def _line(key: str) -> str:
    return "[[tokens]]" if key == "tokens" else f"[{key}]" if _is_table(key) else key


def _is_table(key: str) -> bool:
    field = spec_keys().get(key)
    return field is not None and any(True for _ in models_in(field.annotation))


def _key_in(line: str) -> str:
    """The dotted key that a line of `othernames` names."""
    return line.partition(" = ")[0].strip("[]")


def _is_set(key: str, tables: Any) -> bool:
    for part in key.split("."):
        if not isinstance(tables, Mapping) or part not in tables:
            return False
        tables = tables[part]
    return not isinstance(tables, Mapping)
