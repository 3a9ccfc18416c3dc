"""A Spec from TOML tables, with every fault of its keys; what is not faulty is kept, so that later checks can still
look at it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from runner.core.errors import Fault
from runner.spec.defaults import fill_defaults
from runner.spec.messages import CHOICES, KeyFault, explain
from runner.spec.rules import broken_rules
from runner.spec.run_names import to_run_name
from runner.spec.schema import Spec
from runner.spec.secrets import secret_faults
from runner.spec.source import SpecOrigin
from runner.spec.tables import is_written, overlaps, set_key, without_keys

# For required keys that are missing or faulty, so that the rest of the spec can still be checked.
PLACEHOLDER_VALUES: Mapping[str, Any] = {
    "model": {"base": "builtin:tiny"},
    "model.base": "builtin:tiny",
    "data": {"source": "."},
    "data.source": ".",
}


@dataclass(frozen=True)
class LoadedSpec:
    """One run asked for. unreadable_keys: keys whose values a fault makes useless; if there are any, `spec` is built
    without them, so that all other faults can be reported at once."""

    spec: Spec
    source: SpecOrigin
    unreadable_keys: frozenset[str] = frozenset()


def build_spec(tables: dict[str, Any], source: SpecOrigin, faults: list[Fault]) -> LoadedSpec | None:
    """Adds every fault to `faults`: of single keys, and of keys that do not go together. None where no spec can be
    made."""
    secrets = [KeyFault(key, message) for key, message in secret_faults(tables)]
    spec, key_faults = _validate(tables, source.swept)
    faulty_keys = frozenset(fault.key for fault in key_faults)
    unreadable_keys = faulty_keys | {key for fault in key_faults for key in fault.meant}  # of these no value is known
    if spec is None and faulty_keys:
        spec, left_out = _validate_rest(tables, faulty_keys, source)
        unreadable_keys |= left_out
    hidden = {fault.key for fault in secrets}  # other faults of these would show the secret
    found = secrets + [fault for fault in key_faults if fault.key not in hidden]
    if spec is not None:
        for rule in broken_rules(spec, tables):
            if not any(overlaps(key, other) for key in rule.reads for other in unreadable_keys):
                found.append(KeyFault(rule.key, rule.message, kind="missing" if rule.missing else ""))
    found = [fault for fault in found if not (fault.kind == "missing" and _is_meant(fault.key, key_faults))]
    faults += [source.fault(fault.key, fault.message) for fault in found]
    return None if spec is None else LoadedSpec(spec, source, unreadable_keys | {fault.key for fault in found})


def _is_meant(key: str, faults: Sequence[KeyFault]) -> bool:
    """Whether a misspelt key probably stands for this one, which then is not missing."""
    return any(overlaps(key, meant) for fault in faults for meant in fault.meant)


def _validate(tables: dict[str, Any], swept: Collection[str] = ()) -> tuple[Spec | None, list[KeyFault]]:
    filled = fill_defaults(tables)
    try:
        return Spec.model_validate(filled), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
        return None, _one_per_key([explain(each, filled, tables, swept) for each in errors], tables)
    except RecursionError:
        return None, [KeyFault("", "not a spec: nested too deeply")]


def _one_per_key(faults: Sequence[KeyFault], written: Mapping[str, Any]) -> list[KeyFault]:
    """One fault for each key.

    A union gives one for each of its branches: the one that names the choices is kept, else the first. Of a list and
    its entries, the entries' are kept. None are kept for derived defaults: the key that they derive from has its own.
    """
    best: dict[str, KeyFault] = {}
    for fault in faults:
        if fault.key in best and fault.kind not in CHOICES:
            continue
        if fault.kind == "missing" or not fault.key or is_written(fault.key, written):
            best[fault.key] = fault
    return [fault for fault in best.values() if not any(key.startswith(f"{fault.key}.") for key in best if fault.key)]


def _validate_rest(
    tables: dict[str, Any], faulty_keys: frozenset[str], source: SpecOrigin
) -> tuple[Spec | None, frozenset[str]]:
    """The spec without its faulty keys, and the other keys that had to go with them: tables that are invalid without
    them."""
    rest, left_out = _without(tables, faulty_keys), faulty_keys
    if "name" in faulty_keys:
        rest["name"] = to_run_name(source.file.stem)
    for _ in range(3):
        spec, faults = _validate(rest)
        if spec is not None or not faults:
            return spec, left_out - faulty_keys
        more = frozenset(_table_of(fault.key) for fault in faults) - {""}
        rest, left_out = _without(rest, more), left_out | more
    return None, left_out - faulty_keys


def _without(tables: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    rest = without_keys(tables, keys)
    for key in keys & PLACEHOLDER_VALUES.keys():
        set_key(rest, key, PLACEHOLDER_VALUES[key])
    return rest


def _table_of(key: str) -> str:
    """ "tokens.0.name" -> "tokens.0", "prior.images" -> "prior"."""
    parts = key.split(".")
    return ".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1])
