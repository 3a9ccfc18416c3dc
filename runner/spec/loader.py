"""Reading spec files: all faults of all files at once, each with file, line, key, what was found and what is allowed."""

from __future__ import annotations

import copy
import functools
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from runner.core.errors import Fault, SpecError
from runner.core.user_text import read_user_text
from runner.spec import sweeps
from runner.spec.extends import Reader, base_only_files, read_merged, read_with_lines
from runner.spec.messages import CHOICES, KeyFault, explain
from runner.spec.origins import origins_in
from runner.spec.rules import broken_rules, drop_unused_inversion, fill_defaults, secret_values
from runner.spec.run_names import allowed, clashes, names_in
from runner.spec.schema import RUN_NAME, VERSION_TABLE, Spec
from runner.spec.source import SpecOrigin, dotted_keys
from runner.spec.sweeps import put
from runner.spec.toml_lines import key_lines

# For required keys that are missing or wrong, so that the rest of the spec can still be looked at.
PLACEHOLDER_VALUES: dict[str, Any] = {
    "model": {"base": "builtin:tiny"},
    "model.base": "builtin:tiny",
    "data": {"source": "."},
    "data.source": ".",
}


@dataclass(frozen=True)
class Loaded:
    """One run asked for. `bad`: its faulty keys; where there are any, `spec` is what is left without them, so that
    whatever else is wrong can be told in the same go."""

    spec: Spec
    source: SpecOrigin
    bad: frozenset[str] = frozenset()


def load(paths: Sequence[Path]) -> list[Loaded]:
    """Read files and folders (every *.toml in them, by name), expand sweeps. Raises SpecError with every fault."""
    loaded, faults = load_all(paths)
    if faults:
        raise SpecError(faults)
    return loaded


def load_all(paths: Sequence[Path], runs: Path | None = None) -> tuple[list[Loaded], list[Fault]]:
    """The same, with the faults beside what could be read. `runs`: where a sweep's runs may lie already."""
    faults: list[Fault] = []
    read = functools.cache(read_with_lines)  # a file that many extend is read once
    asked = [one for file in _files(paths, faults, read) if (one := _requested(file, faults, read)) is not None]
    if refused := list(_too_many(asked)):
        for one in asked:  # what else is wrong with them is told in the same go
            _build(one.first(), one.source, faults)
        return [], list(dict.fromkeys([*faults, *refused]))
    there = set(names_in(runs)) if runs and any(one.sweep for one in asked) else set()
    loaded = [built for one in asked for v in _variants(one, runs, there) if (built := _build(*v, faults)) is not None]
    named = [one for one in loaded if "name" not in one.bad]
    met = clashes([(one.spec.name, one.source.file, bool(one.source.swept)) for one in named])
    faults += [named[position].source.fault("name", message) for position, message in met]
    return loaded, list(dict.fromkeys(faults))


def load_text(text: str, file: Path) -> Loaded:
    """The spec that `text` would be as `file`, its [sweep] aside. Raises SpecError with every fault."""
    tables = tomllib.loads(text)
    faults: list[Fault] = []
    tables.pop("sweep", None)
    tables.setdefault("name", file.stem)
    places = {where: (file, line) for where, line in key_lines(text).items()}
    loaded = _build(tables, SpecOrigin(file, places), faults)
    if faults or loaded is None:
        raise SpecError(faults)
    return loaded


def path_at(text: str, source: SpecOrigin, key: str) -> Path:
    """The path that a key's text names, relative to the file that it stands in."""
    return (source.place(key)[0].parent / Path(text).expanduser()).resolve()


def _files(paths: Sequence[Path], faults: list[Fault], read: Reader) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.toml"))
            if not inside:
                faults.append(Fault(path, 1, "", "no *.toml in this folder; name a spec file, or a folder of them"))
            bases = base_only_files(inside, read)
            files += [file for file in inside if file.resolve() not in bases]
        else:
            files.append(path)
    return list(dict.fromkeys(files))


@dataclass(frozen=True)
class RequestedSpec:
    """A spec file as read: its tables less [sweep], and the lists that are to be swept."""

    tables: dict[str, Any]
    source: SpecOrigin
    sweep: dict[str, Any]

    def first(self) -> dict[str, Any]:
        return _with(self.tables, self.tables["name"], {key: values[0] for key, values in self.sweep.items()})


def _requested(file: Path, faults: list[Fault], read: Reader) -> RequestedSpec | None:
    try:
        tables, places = read_merged(file, read=read)
    except SpecError as error:
        faults += error.faults
        return None
    own = tables.pop(VERSION_TABLE, None)  # a run folder's own spec, which is a spec like any other
    if own is not None:
        drop_unused_inversion(tables)
    origins = origins_in(read_user_text(file)) if own is not None else {}
    sweep = sweeps.flat(tables.pop("sweep", {}))
    source = SpecOrigin(file, places, {}, frozenset(dotted_keys(tables)), origins)
    tables.setdefault("name", file.stem)
    bad = [
        Fault(*SpecOrigin(file, places, sweep).place(key.removeprefix("sweep.")), key, message)
        for key, message in sweeps.faults(sweep, tables)
    ]
    faults += bad
    return None if bad else RequestedSpec(tables, source, sweep)


def _too_many(asked: Sequence[RequestedSpec]) -> Iterator[Fault]:
    """More runs than one command takes, counted without making them."""
    counts = [sweeps.count(one.sweep) for one in asked]
    alone = [(one, message) for one in asked if (message := sweeps.too_many(one.sweep))]
    for one, message in alone:
        yield one.source.fault("sweep", message)
    if not alone and sum(counts) > sweeps.MOST_RUNS:
        most = asked[counts.index(max(counts))]
        yield most.source.fault(
            "sweep" if most.sweep else "",
            f"{len(asked)} specs ask for {sum(counts):,} runs together, this one for {max(counts):,}; at most "
            f"{sweeps.MOST_RUNS:,} are allowed in one command; queue some of them after the others",
        )


def _variants(
    asked: RequestedSpec, runs: Path | None, there: Collection[str]
) -> Iterator[tuple[dict[str, Any], SpecOrigin]]:
    """The tables of each run that a file asks for: one, or the product of [sweep]'s lists."""
    name, source = asked.tables["name"], asked.source
    if not asked.sweep:
        yield asked.tables, source
        return
    if not isinstance(name, str) or not re.match(RUN_NAME, name):
        yield asked.first(), source  # so that this fault is told once
        return

    def holds(name: str, swept: sweeps.Swept) -> bool:
        assert runs is not None
        return sweeps.holds(runs / name / "spec.toml", swept, lambda text, key: path_at(text, source, key))

    for run_name, swept in sweeps.expand(name, asked.sweep, there, holds):
        yield (
            _with(asked.tables, run_name, swept),
            SpecOrigin(source.file, source.places, swept, source.written, source.origins),
        )


def _with(tables: dict[str, Any], name: str, swept: Mapping[str, Any]) -> dict[str, Any]:
    variant = copy.deepcopy(tables)
    for key, value in swept.items():
        put(variant, key, value)
    return {**variant, "name": name}


def _build(tables: dict[str, Any], source: SpecOrigin, faults: list[Fault]) -> Loaded | None:
    """Adds every fault: of single keys, and of keys that do not go together. None where nothing can be made of it."""
    told = list(secret_values(tables))
    spec, wrong = _validated(tables, source.swept)
    hidden = {key for key, _ in told}
    told += [(one.key, one.message) for one in wrong if one.key not in hidden]  # a secret's own fault would show it
    bad = frozenset(one.key for one in wrong)
    unknown = bad | {key for one in wrong for key in one.meant}
    if spec is None and bad:
        spec, more = _rest_of(tables, bad, source)  # rules over several keys still hold for the rest
        unknown |= more
    if spec is not None:
        rules = broken_rules(spec, tables)
        told += [
            (rule.key, rule.message) for rule in rules if not any(overlaps(k, b) for k in rule.reads for b in unknown)
        ]
    told = [(key, message) for key, message in told if not (_required(message) and _meant(key, wrong))]
    faults += [source.fault(key, message) for key, message in told]
    return None if spec is None else Loaded(spec, source, unknown | {key for key, _ in told})


def _required(message: str) -> bool:
    return message.startswith("required")


def _meant(key: str, wrong: Sequence[KeyFault]) -> bool:
    """Whether a misspelt key stands for this one: what it lacks is then that key's fault alone."""
    return any(overlaps(key, meant) for one in wrong for meant in one.meant)


def _rest_of(tables: dict[str, Any], bad: frozenset[str], source: SpecOrigin) -> tuple[Spec | None, frozenset[str]]:
    """The spec without its faulty keys, and without the tables that are none without those; what else was left out."""
    rest, left_out = _drop_keys(tables, bad), bad
    for key in bad & PLACEHOLDER_VALUES.keys():
        put(rest, key, PLACEHOLDER_VALUES[key])
    if "name" in bad:
        rest["name"] = allowed(source.file.stem)
    for _ in range(3):
        spec, wrong = _validated(rest)
        if spec is not None or not wrong:
            return spec, left_out - bad
        more = frozenset(_table_around(one.key) for one in wrong) - {""}
        rest, left_out = _drop_keys(rest, more), left_out | more
        for key in more & PLACEHOLDER_VALUES.keys():
            put(rest, key, PLACEHOLDER_VALUES[key])
    return None, left_out - bad


def _table_around(key: str) -> str:
    """ "tokens.0.name" -> "tokens.0", "prior.images" -> "prior"."""
    parts = key.split(".")
    return ".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1])


def _validated(tables: dict[str, Any], swept: Collection[str] = ()) -> tuple[Spec | None, list[KeyFault]]:
    own = fill_defaults(tables)
    try:
        return Spec.model_validate(own), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, _one_per_key([explain(detail, own, tables, swept) for detail in details], tables)
    except RecursionError:
        return None, [KeyFault("", "not a spec: nested too deeply")]


def _one_per_key(told: Sequence[KeyFault], written: Mapping[str, Any]) -> list[KeyFault]:
    """Of a key's several faults (one per branch of a union) the one that names choices, else the first; of a
    list and its entries the entries; none for values that the user did not write, but another faulty key gave."""
    best: dict[str, KeyFault] = {}
    for one in told:
        if one.key in best and one.kind not in CHOICES:
            continue
        if _required(one.message) or _is_written(one.key, written) or not one.key:
            best[one.key] = one
    return [one for one in best.values() if not any(key.startswith(f"{one.key}.") for key in best if one.key)]


def _is_written(key: str, tables: Any) -> bool:
    """Whether the key, or a value that stands in its table's place, is in the file."""
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


def overlaps(key: str, bad: str) -> bool:
    return key == bad or key.startswith(f"{bad}.") or bad.startswith(f"{key}.")


def _drop_keys(tables: dict[str, Any], bad: frozenset[str]) -> dict[str, Any]:
    """A copy less the named keys; entries of arrays are taken out from the back."""
    rest = copy.deepcopy(tables)
    for key in sorted(bad, key=lambda name: [int(p) if p.isdigit() else -1 for p in name.split(".")], reverse=True):
        inner: Any = rest
        *folders, last = key.split(".")
        for folder in folders:
            inner = (
                inner[int(folder)]
                if isinstance(inner, list) and folder.isdigit()
                else inner.get(folder, {})
                if isinstance(inner, dict)
                else {}
            )
        if isinstance(inner, dict):
            inner.pop(last, None)
        elif isinstance(inner, list) and last.isdigit() and int(last) < len(inner):
            del inner[int(last)]
    return rest
