"""Reading spec files: all faults of all files at once, each with file, line, key, what was found and what is allowed."""

from __future__ import annotations

import copy
import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from runner.errors import Fault, SpecError
from runner.inherit import Places, mere_bases, merged, place_of
from runner.origins import DEFAULT, origins_in
from runner.spec import VERSION_TABLE, Spec
from runner.specfaults import KeyFault, explain
from runner.speckeys import Where
from runner.specrules import broken_rules, drop_unused_inversion, fill_defaults, secrets
from runner.tomllines import key_lines
from runner.unknownkeys import show
from runner.usertext import read_user_text

# For required keys that are missing or wrong, so that the rest of the spec can still be looked at.
STAND_INS: dict[str, Any] = {
    "model": {"base": "builtin:tiny"},
    "model.base": "builtin:tiny",
    "data": {"source": "."},
    "data.source": ".",
}


@dataclass(frozen=True)
class Source:
    """Where a spec came from, so that later checks can point at a line. `places`: of its keys, in the file itself or in
    one that it extends; `swept`: what [sweep] set; `written`: every dotted key that stands somewhere; `origins`: of a run
    folder's own spec, what it says of where each value came from."""

    file: Path
    places: Places
    swept: Mapping[str, Any] = field(default_factory=dict)
    written: frozenset[str] = frozenset()
    origins: Mapping[str, str] = field(default_factory=dict)

    def place(self, key: str) -> tuple[Path, int]:
        if key in self.swept:
            where: Where = ("sweep", key) if ("sweep", key) in self.places else ("sweep", *key.split("."))
        else:
            where = tuple(int(part) if part.isdigit() else part for part in key.split(".") if part)
        return place_of(self.places, where) or (self.file, 1)

    def fault(self, key: str, message: str) -> Fault:
        return Fault(*self.place(key), key, self.relative(key, message))

    def relative(self, key: str, message: str) -> str:
        """A message about a key that holds a path, with paths as they could stand there."""
        if key.partition(".")[0] not in ("data", "model", "prior"):
            return message
        folder = re.escape(str(self.place(key)[0].parent.resolve()))
        return re.sub(rf"(?<![\w/.-]){folder}/(?=[\w.])", "", message)

    def origin(self, key: str) -> str:
        """Where a resolved spec's value came from, in words."""
        if swept := next((one for one, value in self.swept.items() if key in _dotted(value, one)), None):
            return f"sweep in {self.place(swept)[0]}"
        if key == "name" and self.swept:
            return f"sweep in {self.file}"
        if key in self.origins:
            return self.origins[key]
        if key not in self.written:
            return DEFAULT
        file, _ = self.place(key)
        return f"set in {file}" if file == self.file else f"extended from {file}"


@dataclass(frozen=True)
class Loaded:
    """One run asked for. `bad`: its faulty keys; where there are any, `spec` is what is left without them, so that
    whatever else is wrong can be told in the same go."""

    spec: Spec
    source: Source
    bad: frozenset[str] = frozenset()


def load(paths: Sequence[Path]) -> list[Loaded]:
    """Read files and folders (every *.toml in them, by name), expand sweeps. Raises SpecError with every fault."""
    loaded, faults = load_all(paths)
    if faults:
        raise SpecError(faults)
    return loaded


def load_all(paths: Sequence[Path]) -> tuple[list[Loaded], list[Fault]]:
    """The same, with the faults beside what could be read."""
    loaded: list[Loaded] = []
    faults: list[Fault] = []
    for file in _files(paths, faults):
        for tables, source in _variants(file, faults):
            if (one := _build(tables, source, faults)) is not None:
                loaded.append(one)
    faults += _same_names(loaded)
    return loaded, list(dict.fromkeys(faults))


def load_text(text: str, file: Path) -> Loaded:
    """The spec that `text` would be as `file`, its [sweep] aside. Raises SpecError with every fault."""
    tables = tomllib.loads(text)
    faults: list[Fault] = []
    tables.pop("sweep", None)
    tables.setdefault("name", file.stem)
    places = {where: (file, line) for where, line in key_lines(text).items()}
    loaded = _build(tables, Source(file, places), faults)
    if faults or loaded is None:
        raise SpecError(faults)
    return loaded


def path_at(text: str, source: Source, key: str) -> Path:
    """The path that a key's text names, relative to the file that it stands in."""
    return (source.place(key)[0].parent / Path(text).expanduser()).resolve()


def _files(paths: Sequence[Path], faults: list[Fault]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.toml"))
            if not inside:
                faults.append(Fault(path, 1, "", "no *.toml in this folder; name a spec file, or a folder of them"))
            bases = mere_bases(inside)
            files += [file for file in inside if file.resolve() not in bases]
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _variants(file: Path, faults: list[Fault]) -> Iterator[tuple[dict[str, Any], Source]]:
    """The tables of each run that a file asks for: one, or the product of [sweep]'s lists."""
    try:
        tables, places = merged(file)
    except SpecError as error:
        faults += error.faults
        return
    own = tables.pop(VERSION_TABLE, None)  # a run folder's own spec, which is a spec like any other
    if own is not None:
        drop_unused_inversion(tables)
    origins = origins_in(read_user_text(file)) if own is not None else {}
    sweep = _flat_sweep(tables.pop("sweep", {}))
    source = Source(file, places, {}, frozenset(_dotted(tables)), origins)
    tables.setdefault("name", file.stem)
    bad = [
        Fault(*(place_of(places, ("sweep", key)) or (file, 1)), f"sweep.{key}", message)
        for key, message in _sweep_faults(sweep)
    ]
    if bad:
        faults += bad
        return
    if not sweep:
        yield tables, source
        return
    for values in itertools.product(*sweep.values()):
        variant = copy.deepcopy(tables)
        for key, value in zip(sweep, values, strict=True):
            _set(variant, key, value)
        label = ",".join(f"{key}={_safe(value)}" for key, value in zip(sweep, values, strict=True))
        variant["name"] = f"{tables['name']}/{label}"
        swept = dict(zip(sweep, values, strict=True))
        yield variant, Source(file, places, swept, source.written, origins)


def _dotted(value: Any, prefix: str = "") -> Iterator[str]:
    """Every key of nested tables and arrays of tables: "lora.rank", "tokens.0.name"."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        items = enumerate(value)
    if prefix:
        yield prefix
    for key, inner in items:
        yield from _dotted(inner, f"{prefix}.{key}" if prefix else str(key))


def _flat_sweep(sweep: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(sweep, dict):
        return {prefix: sweep}
    out: dict[str, Any] = {}
    for key, value in sweep.items():
        out |= _flat_sweep(value, f"{prefix}.{key}" if prefix else key)
    return out


def _sweep_faults(sweep: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, values in sweep.items():
        if not isinstance(values, list) or not values:
            yield key, f'expected a list of values, got {show(values)}; write it as in "lora.rank" = [4, 8, 16]'
        elif key in ("name", ""):
            yield key, "a sweep names its runs itself; sweep another key"


def _set(tables: dict[str, Any], dotted: str, value: Any) -> None:
    *folders, last = dotted.split(".")
    for folder in folders:
        inner = tables.setdefault(folder, {})
        if not isinstance(inner, dict):
            return  # the table's own fault is reported when the spec is built
        tables = inner
    tables[last] = value


def _safe(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", str(value)).strip("-") or "-"


def _build(tables: dict[str, Any], source: Source, faults: list[Fault]) -> Loaded | None:
    """Adds every fault: of single keys, and of keys that do not go together. None where nothing can be made of it."""
    told = list(secrets(tables))
    spec, wrong = _validated(tables)
    hidden = {key for key, _ in told}
    told += [(one.key, one.message) for one in wrong if one.key not in hidden]  # a secret's own fault would show it
    bad = frozenset(one.key for one in wrong)
    unknown = bad | {key for one in wrong for key in one.meant}
    if spec is None and bad:
        spec, more = _rest_of(tables, bad)  # rules over several keys still hold for the rest
        unknown |= more
    if spec is not None:
        rules = broken_rules(spec, tables)
        told += [
            (rule.key, rule.message) for rule in rules if not any(touches(k, b) for k in rule.reads for b in unknown)
        ]
    told = [(key, message) for key, message in told if not (_required(message) and _meant(key, wrong))]
    faults += [source.fault(key, message) for key, message in told]
    return None if spec is None else Loaded(spec, source, unknown | {key for key, _ in told})


def _required(message: str) -> bool:
    return message.startswith("required")


def _meant(key: str, wrong: Sequence[KeyFault]) -> bool:
    """Whether a misspelt key stands for this one: what it lacks is then that key's fault alone."""
    return any(touches(key, meant) for one in wrong for meant in one.meant)


def _rest_of(tables: dict[str, Any], bad: frozenset[str]) -> tuple[Spec | None, frozenset[str]]:
    """The spec without its faulty keys, and without the tables that are none without those; what else was left out."""
    rest, left_out = _without(tables, bad), bad
    for key in bad & STAND_INS.keys():
        _set(rest, key, STAND_INS[key])
    for _ in range(3):
        spec, wrong = _validated(rest)
        if spec is not None or not wrong:
            return spec, left_out - bad
        more = frozenset(_table_around(one.key) for one in wrong) - {""}
        rest, left_out = _without(rest, more), left_out | more
        for key in more & STAND_INS.keys():
            _set(rest, key, STAND_INS[key])
    return None, left_out - bad


def _table_around(key: str) -> str:
    """ "tokens.0.name" -> "tokens.0", "prior.images" -> "prior"."""
    parts = key.split(".")
    return ".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1])


def _validated(tables: dict[str, Any]) -> tuple[Spec | None, list[KeyFault]]:
    own = fill_defaults(tables)
    try:
        return Spec.model_validate(own), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, _one_per_key([explain(detail, own, tables) for detail in details], tables)
    except RecursionError:
        return None, [KeyFault("", "not a spec: nested too deeply")]


def _one_per_key(told: Sequence[KeyFault], written: Mapping[str, Any]) -> list[KeyFault]:
    """Of a key's several faults (one per branch of a union) the one that names choices, else the first; of a
    list and its entries the entries; none for values that the user did not write, but another faulty key gave."""
    best: dict[str, KeyFault] = {}
    for one in told:
        if one.key in best and not one.message.startswith("not one of the names"):
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


def touches(key: str, bad: str) -> bool:
    return key == bad or key.startswith(f"{bad}.") or bad.startswith(f"{key}.")


def _without(tables: dict[str, Any], bad: frozenset[str]) -> dict[str, Any]:
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


def _same_names(loaded: Sequence[Loaded]) -> Iterator[Fault]:
    seen: dict[str, Source] = {}
    for one in loaded:
        name = one.spec.name.lower()  # one folder on disks that ignore case
        if name in seen:
            yield one.source.fault(
                "name",
                f"two runs have this name (found {show(one.spec.name)}, also in {seen[name].file}); give each its own",
            )
        seen.setdefault(name, one.source)
