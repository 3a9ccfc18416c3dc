"""Reading spec files: all faults of all files at once, each with file, line and key."""

from __future__ import annotations

import copy
import functools
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.core.errors import Fault, SpecError
from runner.core.user_text import read_user_text
from runner.spec import sweeps
from runner.spec.build import LoadedSpec, build_spec
from runner.spec.defaults import drop_unused_inversion
from runner.spec.extends import Reader, base_only_files, read_merged, read_with_lines
from runner.spec.origins import origins_in
from runner.spec.run_names import name_clashes, names_in
from runner.spec.schema import RUN_NAME, VERSION_TABLE
from runner.spec.source import SpecOrigin
from runner.spec.tables import dotted_keys, flatten, set_key
from runner.spec.toml_lines import key_lines


def load(paths: Sequence[Path]) -> list[LoadedSpec]:
    """Read files and folders (every *.toml in them, by name), and expand sweeps. Raises SpecError with every fault."""
    specs, faults = load_all(paths)
    if faults:
        raise SpecError(faults)
    return specs


def load_all(paths: Sequence[Path], runs: Path | None = None) -> tuple[list[LoadedSpec], list[Fault]]:
    """The same, but returns the faults beside what could be read. runs: the runs folder, where runs of a sweep may
    already have their names."""
    faults: list[Fault] = []
    read = functools.cache(read_with_lines)  # a file that several extend is read once
    files = [file for path in _files(paths, faults, read) if (file := _read_file(path, faults, read)) is not None]
    if too_many := list(_too_many_runs(files)):
        for file in files:  # the other faults are reported at once
            build_spec(file.first(), file.source, faults)
        return [], list(dict.fromkeys([*faults, *too_many]))
    existing_names = set(names_in(runs)) if runs and any(file.sweep for file in files) else set()
    variants = [variant for file in files for variant in _variants(file, runs, existing_names)]
    specs = [spec for tables, source in variants if (spec := build_spec(tables, source, faults)) is not None]
    named = [spec for spec in specs if "name" not in spec.unreadable_keys]
    for position, message in name_clashes(
        [(each.spec.name, each.source.file, bool(each.source.swept)) for each in named]
    ):
        faults.append(named[position].source.fault("name", message))
    return specs, list(dict.fromkeys(faults))


def load_text(text: str, file: Path) -> LoadedSpec:
    """The spec that `text` would be as `file`, without its [sweep]. Raises SpecError with every fault."""
    tables = tomllib.loads(text)
    tables.pop("sweep", None)
    tables.setdefault("name", file.stem)
    faults: list[Fault] = []
    source = SpecOrigin(file, {path: (file, line) for path, line in key_lines(text).items()})
    spec = build_spec(tables, source, faults)
    if faults or spec is None:
        raise SpecError(faults)
    return spec


def path_at(text: str, source: SpecOrigin, key: str) -> Path:
    """The path that a key's text names, relative to the file that the key is in."""
    return (source.location(key)[0].parent / Path(text).expanduser()).resolve()


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
class SpecFile:
    """A spec file as read: its tables without [sweep], and the lists of [sweep] by dotted key."""

    tables: dict[str, Any]
    source: SpecOrigin
    sweep: dict[str, Any]

    def first(self) -> dict[str, Any]:
        """The tables of its first run."""
        return _with_values(self.tables, self.tables["name"], {key: values[0] for key, values in self.sweep.items()})


def _read_file(file: Path, faults: list[Fault], read: Reader) -> SpecFile | None:
    try:
        tables, locations = read_merged(file, read=read)
    except SpecError as error:
        faults += error.faults
        return None
    is_resolved = (
        tables.pop(VERSION_TABLE, None) is not None
    )  # the spec of a run folder, which can be queued like any other
    if is_resolved:
        drop_unused_inversion(tables)
    origins = origins_in(read_user_text(file)) if is_resolved else {}
    sweep = flatten(tables.pop("sweep", {}))
    source = SpecOrigin(file, locations, {}, frozenset(dotted_keys(tables)), origins)
    tables.setdefault("name", file.stem)
    bad = [
        Fault(*SpecOrigin(file, locations, sweep).location(key.removeprefix("sweep.")), key, message)
        for key, message in sweeps.sweep_faults(sweep, tables)
    ]
    faults += bad
    return None if bad else SpecFile(tables, source, sweep)


def _too_many_runs(files: Sequence[SpecFile]) -> Iterator[Fault]:
    """More runs than one command takes, counted without making them."""
    counts = [sweeps.count(file.sweep) for file in files]
    alone = [(file, message) for file in files if (message := sweeps.too_many(file.sweep))]
    for file, message in alone:
        yield file.source.fault("sweep", message)
    if not alone and sum(counts) > sweeps.MOST_RUNS:
        largest = files[counts.index(max(counts))]
        yield largest.source.fault(
            "sweep" if largest.sweep else "",
            f"{len(files)} specs ask for {sum(counts):,} runs together, this one for {max(counts):,}; at most "
            f"{sweeps.MOST_RUNS:,} are allowed in one command; queue some of them after the others",
        )


def _variants(
    file: SpecFile, runs: Path | None, existing_names: Collection[str]
) -> Iterator[tuple[dict[str, Any], SpecOrigin]]:
    """The tables of each run that a file asks for: one, or the product of the lists of [sweep]. existing_names: of
    runs."""
    name, source = file.tables["name"], file.source
    if not file.sweep:
        yield file.tables, source
        return
    if not isinstance(name, str) or not re.match(RUN_NAME, name):
        yield file.first(), source  # this fault is reported once, not for every run
        return

    def has_values(name: str, swept: sweeps.Swept) -> bool:
        assert runs is not None
        return sweeps.has_values(runs / name / "spec.toml", swept, lambda text, key: path_at(text, source, key))

    for run_name, swept in sweeps.expand(name, file.sweep, existing_names, has_values):
        origin = SpecOrigin(source.file, source.locations, swept, source.set_keys, source.origins)
        yield _with_values(file.tables, run_name, swept), origin


def _with_values(tables: dict[str, Any], name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with a run's name, and the values of its dotted keys."""
    variant = copy.deepcopy(tables)
    for key, value in values.items():
        set_key(variant, key, value)
    return {**variant, "name": name}
