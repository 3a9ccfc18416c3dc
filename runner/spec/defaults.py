"""Defaults that depend on other keys."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runner.spec.schema import Data, Inversion, Lora, TextLora


@dataclass(frozen=True)
class DerivedDefault:
    """causes: the keys that the default depends on; value: the default, of their values (None for one that is not set);
    is_copy: it is the value of the one cause."""

    causes: tuple[str, ...]
    value: Callable[..., Any]
    is_copy: bool = False


def _as_float(number: Any) -> Any:
    return float(number) if isinstance(number, int) and not isinstance(number, bool) else number


def _first_resolution(resolution: Any) -> Any:
    return resolution[0] if isinstance(resolution, list) and resolution else resolution


def _or(otherwise: Any, value: Any) -> Any:
    return otherwise if value is None else value


RESOLUTION = Data.model_fields["resolution"].default
DERIVED_DEFAULTS: Mapping[str, DerivedDefault] = {  # a cause that is derived itself comes first
    "train.lr": DerivedDefault(("optimizer.name",), lambda name: 1.0 if name == "prodigy" else 1e-4),
    "data.variants": DerivedDefault(
        ("data.center_crop", "data.random_flip"), lambda center, flip: 1 if center is True and flip is not True else 4
    ),
    "lora.alpha": DerivedDefault(("lora.rank",), lambda rank: _as_float(_or(Lora().rank, rank)), is_copy=True),
    "inversion.until": DerivedDefault(("lora.until",), lambda until: 1.0 if until == 0 else 0.5),
    "inversion.lr": DerivedDefault(("train.lr",), lambda lr: lr, is_copy=True),
    "text_lora.alpha": DerivedDefault(
        ("text_lora.rank",), lambda rank: _as_float(_or(TextLora().rank, rank)), is_copy=True
    ),
    "text_lora.lr": DerivedDefault(("train.lr",), lambda lr: lr, is_copy=True),
    "validate.size": DerivedDefault(
        ("data.resolution",), lambda resolution: _first_resolution(_or(RESOLUTION, resolution)), is_copy=True
    ),
}


def fill_defaults(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a spec's tables with the derived defaults. Values of a wrong type are left for the models to refuse."""
    filled = copy.deepcopy(dict(tables))
    for name in ("optimizer", "train", "lora", "inversion", "validate"):
        filled.setdefault(name, {})

    def table(name: str) -> dict[str, Any]:
        inner = filled.get(name)
        return inner if isinstance(inner, dict) else {}

    def value_of(key: str) -> Any:
        name, _, last = key.partition(".")
        return table(name).get(last)

    table("optimizer").setdefault("name", "adamw")
    if isinstance(weighting := value_of("train.weighting"), dict):
        weighting.setdefault("scheme", "none")
    for key, default in DERIVED_DEFAULTS.items():
        name, _, last = key.partition(".")
        if name == "data" and not table(name):
            continue  # a required table that is missing is one fault, not one for each of its keys
        table(name).setdefault(last, default.value(*map(value_of, default.causes)))
    return filled


def is_default(key: str, tables: Mapping[str, Any]) -> bool:
    """Whether a key of DERIVED_DEFAULTS has the value that it would have if it were not set."""
    name, _, last = key.partition(".")
    table = tables.get(name)
    if not isinstance(table, Mapping) or last not in table:
        return True
    others = {other: value for other, value in table.items() if other != last}
    return bool(fill_defaults({**tables, name: others})[name][last] == table[last])


def copied_from(key: str, values: Mapping[str, Any]) -> str | None:
    """The key whose value is the default of `key`, if `key` has that value. values: a resolved spec's, by dotted
    key."""
    default = DERIVED_DEFAULTS.get(key)
    if default is None or not default.is_copy:
        return None
    [cause] = default.causes
    return cause if cause in values and values.get(key) == values[cause] else None


def drop_unused_inversion(tables: dict[str, Any]) -> None:
    """Remove [inversion] from a spec that fluxrun wrote for a run without tokens.

    A resolved spec states every default, also of what does not apply. What a user set there stays, to be refused; `lr`
    and `until` were derived.
    """
    inversion = tables.get("inversion")
    if tables.get("tokens") or not isinstance(inversion, dict):
        return
    chosen = {key: value for key, value in inversion.items() if key not in ("lr", "until")}
    default = Inversion().model_dump(mode="json", exclude_none=True)
    if all(default.get(key) == value for key, value in chosen.items()):
        del tables["inversion"]
