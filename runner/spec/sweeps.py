"""[sweep]: one run for each combination of its lists, named so that the same values have the same name every time.

A run is named NAME/KEY=VALUE,KEY=VALUE. Numbers, true and false, and short ASCII text are written as they are, with `-`
for characters that a name may not have. Other values (long ones, other letters, two that would read the same) are
shortened and get a short digest, so that a run's name never depends on the other values of the list.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.core.hashing import content_key
from runner.spec.schema import LONGEST_RUN_NAME, RUN_NAME
from runner.spec.tables import value_at
from runner.spec.unknown_keys import show_value

MOST_RUNS = 10_000  # of one command
LONGEST_VALUE = 40  # characters of a value in a name, without its digest
SHORTER_VALUE = 16  # the same where the whole name would be too long
DIGEST = 8  # hexadecimal digits
LONGEST_NAME = LONGEST_RUN_NAME - DIGEST - 2  # characters of the sweep's own name

Swept = dict[str, Any]  # dotted key -> value


def sweep_faults(sweep: Mapping[str, Any], tables: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, message) for what cannot be swept. tables: the spec's, without [sweep]."""
    name = tables.get("name")
    if sweep and isinstance(name, str) and re.match(RUN_NAME, name):
        if "/" in name:
            yield (
                "name",
                f"expected no / in the name of a sweep, whose runs are called NAME/KEY=VALUE, got {show_value(name)}; remove it",
            )
        if len(name) > LONGEST_NAME:
            yield (
                "name",
                f"expected at most {LONGEST_NAME} characters in the name of a sweep, got {len(name)}; shorten it",
            )
    for key, values in sweep.items():
        if not isinstance(values, list) or not values:
            yield (
                f"sweep.{key}",
                f'expected a list of values, got {show_value(values)}; write it as in "lora.rank" = [4, 8, 16]',
            )
        elif key in ("name", ""):
            yield f"sweep.{key}", "a sweep names its runs itself; sweep another key"
        elif key.partition(".")[0] == "notify":  # an address may be a secret, and values are in the runs' names
            yield (
                f"sweep.{key}",
                "all runs of a sweep send the same notifications; write it below [notify] instead of [sweep]",
            )
        elif repeated := [text for text, count in Counter(map(_exact, values)).items() if count > 1]:
            value = next(value for value in values if _exact(value) == repeated[0])
            yield f"sweep.{key}", f"expected each value once, got {show_value(value)} twice; remove one"
        elif message := _no_entry(tables, key):
            yield f"sweep.{key}", message


def _no_entry(tables: dict[str, Any], key: str) -> str | None:
    """The fault of a key with a list index out of range; None if there is none."""
    table: Any = tables
    parts = key.split(".")
    for number, part in enumerate(parts):
        if isinstance(table, list):
            if not (part.isdecimal() and int(part) < len(table)):
                name = ".".join(parts[:number])
                return f"expected an entry that {name} has ({name}.0 is the first of {len(table)}), got {name}.{part}"
            table = table[int(part)]
        else:
            table = table.get(part) if isinstance(table, dict) else None
    return None


def count(sweep: Mapping[str, Sequence[Any]]) -> int:
    """The number of runs that it asks for; 1 where nothing is swept."""
    return math.prod(len(values) for values in sweep.values())


def too_many(sweep: Mapping[str, Sequence[Any]]) -> str | None:
    """Why this sweep is refused by itself, or None. It is not expanded for that."""
    if (asked := count(sweep)) <= MOST_RUNS:
        return None
    product = " x ".join(f"{len(values):,} of {key}" for key, values in sweep.items())
    return (
        f"asks for {asked:,} runs ({product}); at most {MOST_RUNS:,} are allowed in one command; remove values, or sweep "
        "fewer keys at a time"
    )


@dataclass(frozen=True)
class ValueName:
    """How a value is written in a run's name.

    text: today; in_0_1: as every fluxrun up to 0.1 wrote it; with_digest: with its digest, even where it needs none.
    """

    text: str
    in_0_1: str
    with_digest: str


def expand(
    name: str,
    sweep: Mapping[str, Sequence[Any]],
    existing_names: Collection[str],
    has_values: Callable[[str, Swept], bool],
) -> Iterator[tuple[str, Swept]]:
    """(name, values) of each run.

    existing_names: names of the runs in the runs folder; has_values: whether the run of that name has these values. A
    run that exists under another of its possible names keeps that name: an earlier fluxrun gave it, or the list had
    other values.
    """
    lists = [[*zip(values, _value_names(values), strict=True)] for values in sweep.values()]
    for chosen in itertools.product(*lists):
        swept = dict(zip(sweep, (value for value, _ in chosen), strict=True))
        options = [tuple(dict.fromkeys((each.text, each.in_0_1, each.with_digest))) for _, each in chosen]
        run_name = _joined(name, swept, [texts[0] for texts in options])
        if any(len(texts) > 1 for texts in options):
            possible = (_joined(name, swept, texts) for texts in itertools.product(*options))
            existing = next((other for other in possible if other in existing_names and has_values(other, swept)), None)
            if existing is None and run_name in existing_names:  # another run has it
                run_name = _joined(name, swept, [each.with_digest for _, each in chosen])
            run_name = existing or run_name
        yield run_name, swept


def has_values(spec_file: Path, swept: Swept, path_at: Callable[[str, str], Path]) -> bool:
    """Whether a run's own spec has these values. Paths may be absolute there. True if the spec cannot be read.

    path_at: the path that a text names as the value of a key.
    """
    try:
        tables = tomllib.loads(spec_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True

    def same(recorded: Any, value: Any, key: str) -> bool:
        if isinstance(value, dict):  # its defaults are written there too
            return isinstance(recorded, dict) and all(
                same(recorded.get(name), inner, key) for name, inner in value.items()
            )
        same_path = isinstance(value, str) and isinstance(recorded, str) and str(path_at(value, key)) == recorded
        return bool(recorded == value) or same_path

    return all(same(value_at(tables, key), value, key) for key, value in swept.items())


def _value_names(values: Sequence[Any]) -> list[ValueName]:
    texts = [_safe(value) for value in values]
    readable = [_is_readable(value, text) for value, text in zip(values, texts, strict=True)]
    unchanged = Counter(text.lower() for value, text in zip(values, texts, strict=True) if text == value)
    same = Counter(text.lower() for text, is_readable in zip(texts, readable, strict=True) if is_readable)
    names = []
    for value, text, is_readable in zip(values, texts, readable, strict=True):
        if isinstance(value, int | float):
            names.append(ValueName(str(value), text, str(value)))
            continue
        is_unique = (unchanged if text == value else same)[text.lower()] == 1
        full = _with_digest(value, LONGEST_VALUE)
        names.append(ValueName(text if is_readable and is_unique else full, text, full))
    return names


def _is_readable(value: Any, text: str) -> bool:
    """Whether a value can be told from its text: it is short, no letter is lost, and Windows takes it as a folder's
    name."""
    return len(text) <= LONGEST_VALUE and str(value).isascii() and any(map(str.isalnum, text)) and text[-1] != "."


def _safe(value: Any) -> str:
    """With `-` for characters that a name may not have."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", str(value)).strip("-") or "-"


def _with_digest(value: Any, longest: int) -> str:
    """The beginning of the value, and a digest that tells it from every other one."""
    ascii_only = unicodedata.normalize("NFKD", str(value)).encode("ascii", "ignore").decode()  # letters without accents
    kept = _safe(ascii_only)[:longest].strip("-")
    digest = content_key(_exact(value))[:DIGEST]
    return f"{kept}-{digest}" if kept else digest


def _exact(value: Any) -> str:
    """Different for any two values: 1, 1.0, true and "1" differ."""
    return json.dumps(value, sort_keys=True, default=str)


def _joined(name: str, swept: Swept, texts: Sequence[str]) -> str:
    """NAME/KEY=VALUE,...; with shorter values where that is too long for a name, and cut where it still is."""
    longest = LONGEST_RUN_NAME - len(name) - 1
    keys = [_safe(key) for key in swept]
    label = ",".join(f"{key}={text}" for key, text in zip(keys, texts, strict=True))
    if len(label) > longest:
        shorter = [
            text if len(text) <= SHORTER_VALUE + DIGEST else _with_digest(value, SHORTER_VALUE)
            for value, text in zip(swept.values(), texts, strict=True)
        ]
        label = ",".join(f"{key}={text}" for key, text in zip(keys, shorter, strict=True))
    if len(label) > longest:
        label = f"{label[: max(0, longest - DIGEST - 1)]}-{content_key(_exact(swept))[:DIGEST]}"
    return f"{name}/{label.lstrip('-')}"
