"""What is wrong with one key, in words: the value found, what is allowed, and the nearest valid name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import tomli_w

from runner.spec.keys import (
    BOUNDS,
    Where,
    dotted_key,
    field_of,
    kind_of,
    limits_of,
    metadata_of,
    models_in,
    number,
    spec_keys,
)
from runner.spec.unknown_keys import show_value, unknown_key_faults

CHOICES = {"literal_error", "union_tag_invalid"}  # pydantic's error types of a value that is none of the names allowed
TAGS = {"none", "sigma_sqrt", "logit_normal", "mode", "cosmap", "adamw", "adamw8bit", "prodigy"}


@dataclass(frozen=True)
class KeyFault:
    """What is wrong with a dotted key.

    meant: the keys that it was probably meant for, about which nothing is reported; kind: pydantic's type of the error.
    """

    key: str
    message: str
    meant: tuple[str, ...] = ()
    kind: str = ""


def explain(
    detail: Mapping[str, Any], tables: Mapping[str, Any], written: Mapping[str, Any], swept: Collection[str] = ()
) -> KeyFault:
    """One pydantic error. tables: the spec that it is about; written: the same without defaults; swept: its keys that
    stand in [sweep]."""
    path = _real_path(detail["loc"], tables)
    name, kind, found = ".".join(map(str, path)), detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return KeyFault(name, *unknown_key_faults(path, found, tables, written, swept), kind)
    if kind == "missing":
        return KeyFault(name, _missing(path), kind=kind)
    if kind in CHOICES:
        return _no_choice(name, path, kind, found, detail.get("ctx", {}))
    return KeyFault(name, _told(_expected(path, kind, found, detail), path, kind, found), kind=kind)


def _told(what: str, path: Where, kind: str, found: Any) -> str:
    """With what is allowed, what to type, and what the key means."""
    about = field_of(path)
    if about is None:
        return what
    limits = limits_of(about, every=kind.startswith("less_than"))
    allowed = f"allowed: {limits}" if limits and f"expected {limits}," not in what else ""
    text = "; ".join(part for part in (what, allowed, _to_type(path, about, kind, found)) if part)
    meaning = about.description or ""
    lower = meaning[:1].lower() if meaning[1:2].islower() else meaning[:1]
    return f"{text} ({lower}{meaning[1:]})" if meaning else text


def _no_choice(name: str, path: Where, kind: str, found: Any, context: Mapping[str, Any]) -> KeyFault:
    if kind == "union_tag_invalid":
        inner = "scheme" if path[-1] == "weighting" else "name"
        found = found.get(inner) if isinstance(found, Mapping) else found
        name = f"{name}.{inner}"
    choices = _choices(context)
    about = spec_keys().get(name)
    more = ["true", "false", "a whole number from 1"] if about and "bool" in str(about.annotation) else []
    guess = _guess(str(found), choices)
    if found == []:
        return KeyFault(name, _told("expected at least one name, got []", path, kind, found), kind="too_short")
    return KeyFault(
        name,
        f"expected one of {', '.join([*more, *choices])}, got {show_value(found)}{guess}",
        kind=kind,
    )


TYPES = {  # what pydantic says of an entry of a list, where the key's own type does not tell
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "string_type": "text",
}
FORMS = {
    "name": "the letters A-Z and a-z, digits and . _ = , + -, beginning with a letter, a digit or _, with at most one / between",
    "tokens.name": "the letters A-Z and a-z, digits and _, beginning with no digit",
    "tokens.placeholder": "lower-case letters, digits and -, with a letter first and last",
}


def _expected(path: Where, kind: str, found: Any, detail: Mapping[str, Any]) -> str:
    """`expected a whole number, got '6'`."""
    limits, key, about = detail.get("ctx", {}), dotted_key(path), field_of(path)
    if kind in TYPES:
        whole = about is not None and not isinstance(path[-1], int)
        wanted = (
            "a list of tables" if key == "tokens" and whole else kind_of(about.annotation) if whole else TYPES[kind]
        )
    elif kind == "string_pattern_mismatch":
        wanted = FORMS.get(key, "text on one line")
    elif kind == "string_too_short" or kind == "too_short":
        wanted = "text that is not empty" if isinstance(found, str) else "at least one value"
    elif kind == "string_too_long":
        wanted, found = f"at most {limits['max_length']} characters", len(found)
    elif kind == "finite_number":
        wanted = "a finite number"
    elif kind == "multiple_of":
        wanted = f"a multiple of {limits['multiple_of']}"
    else:
        word = next((word for name, word in BOUNDS.items() if name in limits), "")
        wanted = f"{word} {number(next(iter(limits.values())))}" if word else ""
    if not wanted:
        return f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {show_value(found)}"
    return f"expected {wanted}, got {_got(found)}"


def _got(found: Any) -> str:
    if isinstance(found, Mapping):
        return "a table"
    if isinstance(found, list) and found and all(isinstance(one, Mapping) for one in found):
        return "a list of tables"
    return show_value(found)


def _to_type(path: Where, about: Any, kind: str, found: Any) -> str:
    """The value as it was likely meant, in TOML."""
    key, text = dotted_key(path), str(about.annotation)
    own, last = found if isinstance(found, str) else "", str(path[-1])
    if kind in ("model_type", "model_attributes_type"):
        return _table_to_type(key, about, found)
    if kind == "tuple_type" and key == "tokens":
        return _table_to_type(key, about, found)
    if kind == "tuple_type" and not isinstance(found, Mapping | list) and not _is_number(own):
        return f"write {last} = [{toml(found)}]"
    if kind == "string_pattern_mismatch":
        return _one_line(key, own)
    if isinstance(found, list) and kind in TYPES and len(found) == 1:
        return f"write {toml(found[0])}, without brackets"
    if isinstance(found, list) and kind in TYPES and "tuple[" not in text and not isinstance(path[-1], int):
        return f'to try one after the other, write "{key}" = {toml(found)} below [sweep]'
    if kind == "string_type" and isinstance(found, int | float) and not isinstance(found, bool):
        return f'write it in quotes: "{found}"'
    if kind in ("int_type", "int_from_float") and isinstance(found, float) and found.is_integer():
        return f"write {int(found)}"
    if kind in ("int_type", "float_type", "tuple_type") and _is_number(own):
        return f"write it without quotes: {own.strip()}"
    if kind == "bool_type" and own.lower() in ("true", "false", "yes", "no", "on", "off"):
        return f"write {'true' if own.lower() in ('true', 'yes', 'on') else 'false'}, without quotes"
    if kind == "multiple_of" and isinstance(found, int) and found > 0:
        step = next(item.multiple_of for item in metadata_of(about) if getattr(item, "multiple_of", None))
        below, above = found // step * step, (found // step + 1) * step
        return f"write {f'{below} or ' if below else ''}{above}"
    return ""


FIRST_KEYS = {
    "model": "base",
    "data": "source",
    "tokens": "name",
    "lora": "rank",
    "text_lora": "rank",
    "train": "steps",
}


def _table_to_type(key: str, about: Any, found: Any) -> str:
    """How a table is written that stands there as something else."""
    if key == "tokens" and isinstance(found, Mapping):
        return "write [[tokens]], in double brackets, above each token's keys"
    if isinstance(found, list) and key != "tokens":
        return f"write [{key}], in single brackets"
    header = "[[tokens]]" if key == "tokens" else f"[{key}]"
    fields = {name: one for model in models_in(about.annotation) for name, one in model.model_fields.items()}
    first = FIRST_KEYS.get(key) or next((name for name in ("name", "scheme") if name in fields), "")
    found = found[0] if isinstance(found, list) and found else found
    fits = first and (isinstance(found, str) or kind_of(fields[first].annotation) == "a whole number" == _type(found))
    return f"write {header}, and below it {f'{first} = {toml(found)}' if fits else 'its keys'}"


def _type(found: Any) -> str:
    return "a whole number" if isinstance(found, int) and not isinstance(found, bool) else ""


CONTROLS = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}


def _one_line(key: str, found: str) -> str:
    """Why a text does not have its form, and how it would."""
    if key == "tokens.name":
        near = re.sub(r"\W+", "_", found, flags=re.ASCII).strip("_")
        return f"write {toml(near)}" if re.fullmatch(r"[A-Za-z_]\w*", near, re.ASCII) else ""
    control = next((c for c in found if ord(c) < 32), None)
    if control is None:
        return ""
    typed = "".join(CONTROLS.get(c, c) for c in found)
    shown = CONTROLS.get(control, repr(control)[1:-1])
    if control in "\n\r" and not key.endswith(PATHS):
        return "it holds a line break; write it on one line"
    if not any(ord(c) < 32 for c in typed) and (key.endswith(PATHS) or re.match(r"[A-Za-z]:", found)):
        slashes = typed.replace("\\", "/")
        return f"in double quotes {shown} is a control character, not the backslash of a path; write \"{slashes}\", or '{typed}'"
    return f"it holds the control character {shown}; remove it"


PATHS = ("source", "base", "images")


def toml(value: Any) -> str:
    """A plain value as it is written in a spec."""
    return (
        tomli_w.dumps({"v": value})
        .strip()
        .removeprefix("v = ")
        .replace("\n    ", " ")
        .replace(",\n]", "]")
        .replace("[ ", "[")
    )


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[+-]?\d[\d_]*(\.\d+)?([eE][+-]?\d+)?\s*", text))


EXAMPLES = {
    "model": '[model] and below it base = "black-forest-labs/FLUX.1-dev"',
    "model.base": 'base = "black-forest-labs/FLUX.1-dev"',
    "data": '[data] and below it source = "my-pictures" (the folder of your images)',
    "data.source": 'source = "my-pictures" (the folder of your images)',
    "train": "[train] and below it steps = 1000",
    "prior.images": 'images = "class-images" (the folder for them)',
    "prior.prompt": 'prompt = "a photo of a dog"',
    "tokens.name": 'name = "TOK"',
}


def _missing(path: Where) -> str:
    key, about = dotted_key(path), field_of(path)
    what = "table" if about is not None and kind_of(about.annotation) == "a table" else "key"
    where = "" if len(path) == 1 else f" below {'[[tokens]]' if path[0] == 'tokens' else f'[{path[0]}]'}"
    if key not in EXAMPLES:
        return f"required {what} is missing"
    return f"required {what} is missing; write {EXAMPLES[key]}{where}"


def _real_path(location: tuple[Any, ...], tables: Mapping[str, Any]) -> Where:
    """Pydantic's location less the union branches it tried, which the user never wrote."""
    out: list[str | int] = []
    here: Any = tables
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(here, Mapping):
            known = part in here or (last and part not in TAGS and "[" not in str(part) and "(" not in str(part))
            if known or (position == 0 and last):
                out.append(part)
                here = here.get(part)
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            out.append(part)
            here = here[part]
    return tuple(out)


def _choices(context: Mapping[str, Any]) -> list[str]:
    text = str(context.get("expected") or context.get("expected_tags") or "")
    return [word.strip(" '") for word in text.replace(" or ", ",").split(",") if word.strip(" '")]


def _guess(found: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(found, choices, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""
