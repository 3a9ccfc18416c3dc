"""What is wrong with one key, in words: the value found, what is allowed, what to write instead, and what the key
means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from runner.spec.keys import KINDS, SpecKey, dotted_key, key_at, number, spec_keys, union_tags
from runner.spec.toml_lines import KeyPath
from runner.spec.toml_text import toml_value
from runner.spec.unknown_keys import show_value, unknown_key_faults

CHOICES = ("literal_error", "union_tag_invalid")  # pydantic's types of error for a word that is none of those allowed
TABLES = ("model_type", "model_attributes_type")  # for a value where a table should be
KIND_OF_ENTRY = {  # what an entry of a list should be, by pydantic's type of error: the key's own kind is "a list"
    "int_type": KINDS["integer"],
    "int_from_float": KINDS["integer"],
    "float_type": KINDS["number"],
    "bool_type": KINDS["boolean"],
    "tuple_type": KINDS["array"],
    "string_type": KINDS["string"],
    **dict.fromkeys(TABLES, "a table"),
}
FORMS = {  # what a text with a pattern may hold
    "name": "the letters A-Z and a-z, digits and . _ = , + -, beginning with a letter, a digit or _, with at most one / between",
    "tokens.name": "the letters A-Z and a-z, digits and _, beginning with no digit",
    "tokens.placeholder": "lower-case letters, digits and -, with a letter first and last",
}
BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}  # by pydantic's names
FIRST_KEYS = {
    "model": "base",
    "data": "source",
    "tokens": "name",
    "lora": "rank",
    "text_lora": "rank",
    "train": "steps",
}
PATHS = ("source", "base", "images")  # the last parts of keys that hold paths
CONTROLS = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}
EXAMPLES = {  # of required keys
    "model": '[model] and below it base = "black-forest-labs/FLUX.1-dev"',
    "model.base": 'base = "black-forest-labs/FLUX.1-dev"',
    "data": '[data] and below it source = "my-pictures" (the folder of your images)',
    "data.source": 'source = "my-pictures" (the folder of your images)',
    "train": "[train] and below it steps = 1000",
    "prior.images": 'images = "class-images" (the folder for them)',
    "prior.prompt": 'prompt = "a photo of a dog"',
    "tokens.name": 'name = "TOK"',
}


@dataclass(frozen=True)
class KeyFault:
    """What is wrong with a dotted key.

    meant: the keys that an unknown one was probably meant for, about which nothing else is reported; kind: pydantic's
    type of the error.
    """

    key: str
    message: str
    meant: tuple[str, ...] = ()
    kind: str = ""


def explain(
    error: Mapping[str, Any], tables: Mapping[str, Any], written: Mapping[str, Any], swept: Collection[str] = ()
) -> KeyFault:
    """One of pydantic's errors.

    tables: the spec that it is about; written: the same without defaults; swept: the keys that [sweep] sets.
    """
    path = _written_path(error["loc"], tables)
    key, kind, value = ".".join(map(str, path)), error["type"], error["input"]
    if kind == "extra_forbidden":
        return KeyFault(key, *unknown_key_faults(path, value, tables, written, swept), kind)
    if kind == "missing":
        return KeyFault(key, _missing(path), kind=kind)
    if kind in CHOICES and value == []:
        kind = "too_short"  # another branch of the union takes a list
    if kind in CHOICES:
        return _no_choice(key, path, error)
    return KeyFault(key, _with_advice(_expected(path, kind, error), path, kind, value), kind=kind)


def _written_path(location: tuple[Any, ...], tables: Mapping[str, Any]) -> KeyPath:
    """Pydantic's location of an error, without the branches of unions that it tried, which the user never wrote."""
    path: list[str | int] = []
    value: Any = tables
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(value, Mapping):
            is_branch = part in union_tags() or "[" in str(part) or "(" in str(part)
            if part in value or (last and (position == 0 or not is_branch)):
                path.append(part)
                value = value.get(part)
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
    return tuple(path)


def _missing(path: KeyPath) -> str:
    key = dotted_key(path)
    what = "table" if key in spec_keys() and spec_keys()[key].kind == "a table" else "key"
    if key not in EXAMPLES:
        return f"required {what} is missing"
    table = "" if len(path) == 1 else f" below {'[[tokens]]' if path[0] == 'tokens' else f'[{path[0]}]'}"
    return f"required {what} is missing; write {EXAMPLES[key]}{table}"


def _no_choice(key: str, path: KeyPath, error: Mapping[str, Any]) -> KeyFault:
    """Of a word that is none of those allowed."""
    value, kind = error["input"], error["type"]
    if kind == "union_tag_invalid":
        tag = "scheme" if path[-1] == "weighting" else "name"
        value = value.get(tag) if isinstance(value, Mapping) else value
        key = f"{key}.{tag}"
    choices = _choices(error.get("ctx", {}))
    near = difflib.get_close_matches(str(value), choices, 1, 0.6)
    guess = f"; did you mean {near[0]}?" if near else ""
    about = spec_keys().get(key)
    if about and any(form.get("type") == "boolean" for form in about.forms):
        choices = ["true", "false", "a whole number from 1", *choices]
    return KeyFault(key, f"expected one of {', '.join(choices)}, got {show_value(value)}{guess}", kind=kind)


def _choices(context: Mapping[str, Any]) -> list[str]:
    """Of pydantic's "'a', 'b' or 'c'"."""
    text = str(context.get("expected") or context.get("expected_tags") or "")
    return [word.strip(" '") for word in text.replace(" or ", ",").split(",") if word.strip(" '")]


def _expected(path: KeyPath, kind: str, error: Mapping[str, Any]) -> str:
    """`expected a whole number, got '6'`."""
    value, limits, key = error["input"], error.get("ctx", {}), dotted_key(path)
    if kind in KIND_OF_ENTRY:
        wanted = _expected_kind(path, kind)
    elif kind == "string_pattern_mismatch":
        wanted = FORMS.get(key, "text on one line")
    elif kind in ("string_too_short", "too_short"):
        wanted = "text that is not empty" if isinstance(value, str) else "at least one value"
    elif kind == "string_too_long":
        wanted, value = f"at most {limits['max_length']} characters", len(value)
    elif kind == "finite_number":
        wanted = "a finite number"
    elif kind == "multiple_of":
        wanted = f"a multiple of {limits['multiple_of']}"
    elif bound := next((name for name in BOUNDS if name in limits), ""):
        wanted = f"{BOUNDS[bound]} {number(limits[bound])}"
    else:
        return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {show_value(value)}"
    return f"expected {wanted}, got {_describe(value)}"


def _expected_kind(path: KeyPath, kind: str) -> str:
    about = key_at(path)
    if about is None or isinstance(path[-1], int):
        return KIND_OF_ENTRY[kind]
    return "a list of tables" if about.is_table and about.takes_list else about.kind


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        return "a list of tables"
    return show_value(value)


def _with_advice(problem: str, path: KeyPath, kind: str, value: Any) -> str:
    """The problem with what is allowed, what to write, and what the key means."""
    about = key_at(path)
    if about is None:
        return problem
    limits = about.limits(every=kind.startswith("less_than"))
    allowed = f"allowed: {limits}" if limits and f"expected {limits}," not in problem else ""
    text = "; ".join(part for part in (problem, allowed, _way_out(path, about, kind, value)) if part)
    meaning = about.meaning
    first = meaning[:1].lower() if meaning[1:2].islower() else meaning[:1]
    return f"{text} ({first}{meaning[1:]})" if meaning else text


def _way_out(path: KeyPath, about: SpecKey, kind: str, value: Any) -> str:
    """What to write: the value as it was probably meant, in TOML. "" where that cannot be guessed."""
    key, last = dotted_key(path), str(path[-1])
    if kind in TABLES or (kind == "tuple_type" and about.is_table):
        return _write_table(key, value)
    if kind == "string_pattern_mismatch":
        return _write_text(key, value)
    if kind == "multiple_of" and isinstance(value, int) and value > 0 and about.step:
        below, above = value // about.step * about.step, (value // about.step + 1) * about.step
        return f"write {f'{below} or ' if below else ''}{above}"
    if isinstance(value, list) and value and kind in KIND_OF_ENTRY and not isinstance(value[0], Mapping):
        if len(value) == 1:
            return f"write {toml_value(value[0])}, without brackets"
        if not about.takes_list and not isinstance(path[-1], int):
            return f'to try one after the other, write "{key}" = {toml_value(value)} below [sweep]'
    if isinstance(value, str):
        return _write_unquoted(last, kind, value)
    if kind == "tuple_type" and not isinstance(value, Mapping | list):
        return f"write {last} = [{toml_value(value)}]"
    if kind == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        return f'write it in quotes: "{value}"'
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return ""


def _write_unquoted(last: str, kind: str, text: str) -> str:
    """Where a number, true, false or a list should be instead of a text."""
    is_number = re.fullmatch(r"\s*[+-]?\d[\d_]*(\.\d+)?([eE][+-]?\d+)?\s*", text)
    if kind in ("int_type", "float_type", "tuple_type") and is_number:
        return f"write it without quotes: {text.strip()}"
    if kind == "tuple_type":
        return f"write {last} = [{toml_value(text)}]"
    if kind == "bool_type" and text.lower() in ("true", "false", "yes", "no", "on", "off"):
        return f"write {'true' if text.lower() in ('true', 'yes', 'on') else 'false'}, without quotes"
    return ""


def _write_table(key: str, value: Any) -> str:
    """How to write a table where the key has another value."""
    if key == "tokens" and isinstance(value, Mapping):
        return "write [[tokens]], in double brackets, above each token's keys"
    if isinstance(value, list) and key != "tokens":
        return f"write [{key}], in single brackets"
    header = "[[tokens]]" if key == "tokens" else f"[{key}]"
    value = value[0] if isinstance(value, list) and value else value
    candidates = (FIRST_KEYS.get(key), "name", "scheme")
    first = next((name for name in candidates if name and f"{key}.{name}" in spec_keys()), "")
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if first and (isinstance(value, str) or (is_whole and spec_keys()[f"{key}.{first}"].kind == KINDS["integer"])):
        return f"write {header}, and below it {first} = {toml_value(value)}"
    return f"write {header}, and below it its keys"


def _write_text(key: str, text: str) -> str:
    """Why a text does not match its pattern, and how it would."""
    if key == "tokens.name":
        near = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
        return f"write {toml_value(near)}" if re.fullmatch(r"[A-Za-z_]\w*", near, re.ASCII) else ""
    control = next((character for character in text if ord(character) < 32), None)
    if control is None:
        return ""
    if control in "\n\r" and not key.endswith(PATHS):
        return "it holds a line break; write it on one line"
    shown = CONTROLS.get(control, repr(control)[1:-1])
    typed = "".join(CONTROLS.get(character, character) for character in text)
    if not any(ord(character) < 32 for character in typed) and (key.endswith(PATHS) or re.match(r"[A-Za-z]:", text)):
        slashes = typed.replace("\\", "/")
        return f"in double quotes {shown} is a control character, not the backslash of a path; write \"{slashes}\", or '{typed}'"
    return f"it holds the control character {shown}; remove it"
