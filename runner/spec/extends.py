"""A spec file with what it extends: tables merge key by key, anything else is replaced; where each key stands is kept."""

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

KEY = "extends"
DEEPEST = 8  # files in a chain; more is a mistake rather than a wish

Locations = Mapping[KeyPath, tuple[Path, int]]
Reader = Callable[[Path], tuple[dict[str, Any], dict[KeyPath, int]]]


def read_with_lines(file: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """A file's tables, and the line of each key. Raises SpecError."""
    tables, text = read_toml(file)
    return tables, key_lines(text)


def read_merged(
    file: Path, below: tuple[Path, ...] = (), read: Reader = read_with_lines
) -> tuple[dict[str, Any], Locations]:
    """The tables of a spec file laid over those of the file it extends, and file and line of each key.

    below: the files that led here; read: how a file is read, so that its caller may keep what several extend. Raises
    SpecError.
    """
    found, lines = read(file)
    tables = dict(found)
    places: Locations = {where: (file, line) for where, line in lines.items()}
    if KEY not in tables:
        return tables, places
    told, chain = tables.pop(KEY), (*below, file)
    base = _base(told, chain, line_of(lines, (KEY,)))
    under, under_places = read_merged(base, chain, read)
    replaced: set[KeyPath] = set()
    laid = _deep_merge(under, tables, replaced)
    kept = {where: place for where, place in under_places.items() if not _inside(where, replaced)}
    return laid, {**kept, **places}


def _base(told: Any, chain: tuple[Path, ...], line: int) -> Path:
    file = chain[-1]

    def refused(message: str) -> SpecError:
        return _refused(file, message, line, KEY)

    if not isinstance(told, str) or not told:
        raise refused(f'expected the name of one TOML file, got {told!r}; write it as in extends = "base.toml"')
    base = Path(os.path.normpath(file.parent / Path(told).expanduser()))
    if base.resolve() in [one.resolve() for one in chain]:
        way = " -> ".join(one.name for one in (*chain, base))
        raise refused(f"the files extend each other in a circle ({way}); remove one {KEY}")
    if len(chain) >= DEEPEST:
        raise refused(
            f"expected at most {DEEPEST} files that extend each other, got {told!r} after them; merge some of them"
        )
    if not base.is_file():
        raise refused(f"expected an existing file, got {told!r}; name a TOML file, relative to this one")
    return base


def _deep_merge(
    under: Mapping[str, Any], over: Mapping[str, Any], replaced: set[KeyPath], at: KeyPath = ()
) -> dict[str, Any]:
    """`replaced`: gets the keys of which nothing is left."""
    tables = dict(under)
    for key, value in over.items():
        where = (*at, key)
        if isinstance(value, dict) and isinstance(tables.get(key), dict):
            tables[key] = _deep_merge(tables[key], value, replaced, where)
        else:
            tables[key] = value
            replaced.add(where)
    return tables


def _inside(where: KeyPath, replaced: Collection[KeyPath]) -> bool:
    return any(where[:length] in replaced for length in range(1, len(where) + 1))


def location_of(places: Locations, where: KeyPath) -> tuple[Path, int] | None:
    """File and line of a key, else of the nearest table around it."""
    for length in range(len(where), 0, -1):
        if where[:length] in places:
            return places[where[:length]]
    return None


def base_only_files(files: Iterable[Path], read: Reader = read_with_lines) -> set[Path]:
    """Those files that others of these extend and that are no whole spec: nobody means them as runs."""
    found: dict[Path, dict[str, Any]] = {}
    extended: set[Path] = set()
    for file in files:
        try:
            own, _ = read(file)
            found[file.resolve()] = read_merged(file, read=read)[0]
        except SpecError:
            continue  # told when the file is read as a spec
        if isinstance(told := own.get(KEY), str):
            extended.add((file.parent / Path(told).expanduser()).resolve())
    return {file for file in extended & found.keys() if not _whole(found[file])}


def _whole(tables: Mapping[str, Any]) -> bool:
    def has(table: str, *keys: str) -> bool:
        inner = tables.get(table)
        return isinstance(inner, dict) and any(key in inner for key in keys)

    return has("model", "base") and has("data", "source") and has("train", "steps", "epochs")


def read_toml(file: Path) -> tuple[dict[str, Any], str]:
    """Raises SpecError with what is wrong with the file as such."""
    try:
        text = read_user_text(file)
        return tomllib.loads(text), text
    except FileNotFoundError:
        raise _refused(file, "no such file; a SPEC is a TOML file, or a folder of them") from None
    except NotUtf8Error as error:
        raise _refused(file, error.message, error.line) from error
    except OSError as error:
        raise _refused(file, f"cannot be read ({error.strerror}); name a TOML file that you may read") from error
    except ValueError as error:  # TOMLDecodeError, and int() itself for thousands of digits
        faults = [Fault(file, line, "", f"not TOML: {message}") for line, message in toml_faults(text)]
        raise SpecError(faults) from error
    except RecursionError as error:
        raise _refused(file, "not a spec: nested too deeply") from error


def _refused(file: Path, message: str, line: int = 1, key: str = "") -> SpecError:
    return SpecError([Fault(file, line, key, message)])
