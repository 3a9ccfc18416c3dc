"""Reading a spec file with the files that it extends: tables merge key by key, all other values are replaced."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from runner.core.errors import Fault, SpecError
from runner.core.user_text import NotUtf8Error, read_user_text
from runner.spec.toml_errors import toml_faults
from runner.spec.toml_lines import KeyPath, key_lines, line_of

EXTENDS = "extends"
MOST_FILES = 8  # of a chain; more is probably a mistake

Locations = Mapping[KeyPath, tuple[Path, int]]  # file and line of each key
Reader = Callable[[Path], tuple[dict[str, Any], dict[KeyPath, int]]]


def read_with_lines(file: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """A file's tables, and the line of each key. Raises SpecError."""
    tables, text = read_toml(file)
    return tables, key_lines(text)


def read_merged(
    file: Path, extended_by: tuple[Path, ...] = (), read: Reader = read_with_lines
) -> tuple[dict[str, Any], Locations]:
    """The tables of a spec file, merged over those of the file that it extends, and the location of each key.

    extended_by: the chain of files that led here; read: how to read one file, so that a caller can cache those that
    several extend. Raises SpecError.
    """
    found, lines = read(file)
    tables = dict(found)
    locations: Locations = {path: (file, line) for path, line in lines.items()}
    if EXTENDS not in tables:
        return tables, locations
    chain = (*extended_by, file)
    base = _base_file(tables.pop(EXTENDS), chain, line_of(lines, (EXTENDS,)))
    base_tables, base_locations = read_merged(base, chain, read)
    replaced: set[KeyPath] = set()
    merged = _deep_merge(base_tables, tables, replaced)
    kept = {path: location for path, location in base_locations.items() if not _is_inside(path, replaced)}
    return merged, {**kept, **locations}


def _base_file(name: Any, chain: tuple[Path, ...], line: int) -> Path:
    """The file that the last one of the chain extends. name: the value of `extends`. Raises SpecError."""
    file = chain[-1]

    def refused(message: str) -> SpecError:
        return _refused(file, message, line, EXTENDS)

    if not isinstance(name, str) or not name:
        raise refused(f'expected the name of one TOML file, got {name!r}; write it as in extends = "base.toml"')
    base = Path(os.path.normpath(file.parent / Path(name).expanduser()))
    if base.resolve() in [earlier.resolve() for earlier in chain]:
        circle = " -> ".join(path.name for path in (*chain, base))
        raise refused(f"the files extend each other in a circle ({circle}); remove one {EXTENDS}")
    if len(chain) >= MOST_FILES:
        raise refused(
            f"expected at most {MOST_FILES} files that extend each other, got {name!r} after them; merge some of them"
        )
    if not base.is_file():
        raise refused(f"expected an existing file, got {name!r}; name a TOML file, relative to this one")
    return base


def _deep_merge(
    under: Mapping[str, Any], over: Mapping[str, Any], replaced: set[KeyPath], at: KeyPath = ()
) -> dict[str, Any]:
    """Adds to `replaced` the keys of which nothing of `under` is left."""
    tables = dict(under)
    for key, value in over.items():
        path = (*at, key)
        if isinstance(value, dict) and isinstance(tables.get(key), dict):
            tables[key] = _deep_merge(tables[key], value, replaced, path)
        else:
            tables[key] = value
            replaced.add(path)
    return tables


def _is_inside(path: KeyPath, replaced: Collection[KeyPath]) -> bool:
    return any(path[:length] in replaced for length in range(1, len(path) + 1))


def location_of(locations: Locations, path: KeyPath) -> tuple[Path, int] | None:
    """File and line of a key, else of the nearest table around it."""
    for length in range(len(path), 0, -1):
        if path[:length] in locations:
            return locations[path[:length]]
    return None


def base_only_files(files: Iterable[Path], read: Reader = read_with_lines) -> set[Path]:
    """Those that others extend and that are no whole spec: they are not meant as runs."""
    merged: dict[Path, dict[str, Any]] = {}
    extended: set[Path] = set()
    for file in files:
        try:
            tables, _ = read(file)
            merged[file.resolve()] = read_merged(file, read=read)[0]
        except SpecError:
            continue  # reported when the file is read as a spec
        if isinstance(base := tables.get(EXTENDS), str):
            extended.add((file.parent / Path(base).expanduser()).resolve())
    return {file for file in extended & merged.keys() if not _is_whole(merged[file])}


def _is_whole(tables: Mapping[str, Any]) -> bool:
    """Whether all required keys are set."""

    def has(table: str, *keys: str) -> bool:
        inner = tables.get(table)
        return isinstance(inner, dict) and any(key in inner for key in keys)

    return has("model", "base") and has("data", "source") and has("train", "steps", "epochs")


def read_toml(file: Path) -> tuple[dict[str, Any], str]:
    """The tables of a file, and its text. Raises SpecError with every fault of its syntax."""
    try:
        text = read_user_text(file)
        return tomllib.loads(text), text
    except FileNotFoundError:
        raise _refused(file, "no such file; a SPEC is a TOML file, or a folder of them") from None
    except NotUtf8Error as error:
        raise _refused(file, error.message, error.line) from error
    except OSError as error:
        raise _refused(file, f"cannot be read ({error.strerror}); name a TOML file that you may read") from error
    except ValueError as error:  # TOMLDecodeError, and int()'s for thousands of digits
        faults = [Fault(file, line, "", f"not TOML: {message}") for line, message in toml_faults(text)]
        raise SpecError(faults) from error
    except RecursionError as error:
        raise _refused(file, "not a spec: nested too deeply") from error


def _refused(file: Path, message: str, line: int = 1, key: str = "") -> SpecError:
    return SpecError([Fault(file, line, key, message)])
