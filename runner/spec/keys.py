"""The keys that a spec may hold, read off its models: where each is, of what kind, within which limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from runner.spec.schema import Spec

Where = tuple[str | int, ...]
BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def dotted_key(path: Where) -> str:
    return ".".join(str(part) for part in path if not isinstance(part, int))


def field_of(path: Where) -> Any:
    return spec_keys().get(dotted_key(path))


@cache
def spec_keys() -> dict[str, Any]:
    """Every dotted key with its field."""
    return dict(all_keys(Spec))


def metadata_of(field: Any) -> list[Any]:
    found = list(field.metadata)
    for part in (field.annotation, *get_args(field.annotation)):
        for item in getattr(part, "__metadata__", ()):
            found += getattr(item, "metadata", [item])
    return found


def number(value: float) -> str:
    """A limit as it is written in a spec: `2147483648`, not `2.14748e+09`."""
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def limits_of(field: Any, every: bool = False) -> str:
    """`1 to 4096`, `more than 0`. every: also the limit of 2**31 that keys have which need none."""
    found: dict[str, float] = {}
    for item in metadata_of(field):
        for name in (*BOUNDS, "multiple_of"):
            limit = getattr(item, name, None)
            if limit is not None and (every or limit != 2**31):
                found.setdefault(name, limit)
    if "ge" in found and "le" in found:
        text = f"{number(found['ge'])} to {number(found['le'])}"
    else:
        text = " and ".join(f"{word} {number(found[name])}" for name, word in BOUNDS.items() if name in found)
    return text + (f" in steps of {number(found['multiple_of'])}" if "multiple_of" in found else "")


def kind_of(annotation: Any) -> str:
    text = str(annotation)
    names = [
        name
        for name, mark in (
            ("a table", "runner.spec.schema."),
            ("true or false", "bool"),
            ("a whole number", "int"),
            ("a number", "float"),
            ("text", "str"),
            ("a list", "tuple["),
        )
        if mark in text.replace("strict", "").replace("string", "")
    ]
    if annotation in (int, float, str, bool):
        names = [{int: "a whole number", float: "a number", str: "text", bool: "true or false"}[annotation]]
    if text.startswith("tuple["):  # a list and nothing else
        return "a list of text" if names == ["text", "a list"] else "a list"
    if "Literal[" in text:
        choices = text[text.index("Literal[") + 8 :].split("]", maxsplit=1)[0].replace("'", "")
        first = [name for name in names if name != "a list" and "true or false" in names]
        names = [*first, f"one of {choices}", *(name for name in names if name == "a list")]
    return " or ".join(dict.fromkeys(names)) or "another value"


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of the spec with its field; the tables of a union are laid over each other."""
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        yield dotted, field
        for inner in models_in(field.annotation):
            yield from all_keys(inner, f"{dotted}.")


def keys_of(path: Where, tables: Mapping[str, Any]) -> set[str]:
    """The keys allowed in the table at `path`; of a union, those of the kind that the table names."""
    models: list[type[BaseModel]] = [Spec]
    here: Any = tables
    for part in path:
        within: Any = here
        here = within[part] if isinstance(here, Mapping | list | tuple) else None
        if not isinstance(part, int):
            models = [
                inner
                for model in models
                for name, field in model.model_fields.items()
                if (field.alias or name) == part
                for inner in models_in(field.annotation)
            ]
    if isinstance(here, Mapping):
        tag = here.get("name", here.get("scheme"))
        chosen = [
            m
            for m in models
            if any(tag in get_args(f.annotation) for n, f in m.model_fields.items() if n in ("name", "scheme"))
        ]
        models = chosen or models
    extra = {"sweep", "extends"} if not path else set()
    return {field.alias or name for model in models for name, field in model.model_fields.items()} | extra
