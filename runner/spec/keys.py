"""The keys that a spec may hold: of what kind each is, within which limits, and what it means.

All of it is read from the JSON Schema that pydantic makes of the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from runner.spec.json_schema import models_schema
from runner.spec.toml_lines import KeyPath

Schema = Mapping[str, Any]

KINDS = {
    "boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text", "array": "a list"
}  # fmt: skip
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "less than"}
NO_LIMIT = 2**31  # the maximum of whole numbers that need none; it is shown only to someone who exceeds it


@dataclass(frozen=True)
class SpecKey:
    """A key, or a table.

    forms: JSON Schemas of the values that it may have, one for each branch of a union; tables: of those among them (or
    among a list's entries) that are tables; meaning: in words, "" where a table says it itself.
    """

    forms: tuple[Schema, ...]
    tables: tuple[Schema, ...]
    meaning: str

    @property
    def is_table(self) -> bool:
        return bool(self.tables)

    @property
    def takes_list(self) -> bool:
        return any(form.get("type") == "array" for form in self.forms)

    @property
    def choices(self) -> list[str]:
        """The words that it may be."""
        return [word for form in self.forms for word in _words(form)]

    @property
    def kind(self) -> str:
        """Of its values, in words: "a whole number", "a list or one of attention, attention+mlp, all"."""
        if self.is_table and not self.takes_list:
            return "a table"
        kinds = [KINDS[form["type"]] for form in self.forms if not _words(form)]
        if len(self.forms) == 1 and self.takes_list:
            entry = self.forms[0]["items"]
            kinds = ["a list of text" if entry.get("type") == "string" and not _words(entry) else "a list"]
        if self.choices:
            kinds.append(f"one of {', '.join(self.choices)}" if len(self.choices) > 1 else f'"{self.choices[0]}"')
        return " or ".join(kinds)

    @property
    def step(self) -> int | None:
        """What its numbers must be multiples of."""
        return next((form["multipleOf"] for form in self.forms if "multipleOf" in form), None)

    def limits(self, *, every: bool = False) -> str:
        """Of its numbers, in words: "1 to 4096", "more than 0", "" for none. every: NO_LIMIT too."""
        bounds = {
            name: form[name]
            for name in BOUNDS
            for form in self.forms
            if name in form and (every or form[name] != NO_LIMIT)
        }
        if "minimum" in bounds and "maximum" in bounds:
            text = f"{number(bounds['minimum'])} to {number(bounds['maximum'])}"
        else:
            text = " and ".join(f"{BOUNDS[name]} {number(limit)}" for name, limit in bounds.items())
        return f"{text} in steps of {self.step}" if self.step else text


def dotted_key(path: KeyPath) -> str:
    """The key at a path, without positions in lists: ("tokens", 0, "name") -> "tokens.name"."""
    return ".".join(str(part) for part in path if not isinstance(part, int))


def key_at(path: KeyPath) -> SpecKey | None:
    """None for a key that no spec has."""
    return spec_keys().get(dotted_key(path))


@cache
def spec_keys() -> dict[str, SpecKey]:
    """Every key and table by its dotted name. A key that several tables of a union have is the last one's."""
    return dict(_keys_below(models_schema(), ""))


@cache
def union_tags() -> frozenset[str]:
    """The names by which pydantic tells the tables of a union apart: "adamw", "logit_normal"."""
    models = (models_schema(), *models_schema()["$defs"].values())
    fields = [field for model in models for field in model["properties"].values()]
    return frozenset(tag for field in fields for tag in field.get("discriminator", {}).get("mapping", ()))


def keys_allowed(path: KeyPath, tables: Mapping[str, Any]) -> set[str]:
    """The keys of the table at `path` of a spec; of a union's tables, those of the one that the spec chose by its
    name."""
    models: list[Schema] = [models_schema()]
    table: Any = tables
    for part in path:
        outer: Any = table
        table = outer[part] if isinstance(table, Mapping | list | tuple) else None
        if not isinstance(part, int):
            fields = [model["properties"][part] for model in models if part in model["properties"]]
            models = [inner for field in fields for inner in _tables(field)]
    if isinstance(table, Mapping):
        tag = table.get("name", table.get("scheme"))
        models = [model for model in models if tag in _tags(model)] or models
    at_the_top = {"sweep", "extends"} if not path else set()
    return {name for model in models for name in model["properties"]} | at_the_top


def number(value: float) -> str:
    """A limit as it is written in a spec: `2147483648`, not `2.14748e+09`."""
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _keys_below(model: Schema, prefix: str) -> Iterator[tuple[str, SpecKey]]:
    for name, field in model["properties"].items():
        tables = tuple(_tables(field))
        yield f"{prefix}{name}", SpecKey(tuple(_forms(field)), tables, field.get("description", ""))
        for table in tables:
            yield from _keys_below(table, f"{prefix}{name}.")


def _forms(field: Schema) -> Iterator[Schema]:
    """The branches of a union, without null, which TOML does not have."""
    for form in field.get("anyOf", field.get("oneOf", (field,))):
        if form.get("type") != "null":
            yield form


def _tables(field: Schema) -> Iterator[Schema]:
    for form in _forms(field):
        for part in (form, form.get("items", {})):
            if "$ref" in part:
                yield models_schema()["$defs"][part["$ref"].rpartition("/")[2]]


def _words(form: Schema) -> list[str]:
    words: list[str] = form.get("enum", [form["const"]] if "const" in form else [])
    return words


def _tags(model: Schema) -> list[str]:
    return [word for name in ("name", "scheme") for word in _words(model["properties"].get(name, {}))]
