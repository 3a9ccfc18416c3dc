"""[sweep]: one run for each combination of its lists, each with a name that is the same in every night. No torch.

A run is named NAME/KEY=VALUE,KEY=VALUE. Numbers, true and false, and short ASCII text stand there as they are, with `-` for
what a name may not hold. Other values (longer ones, other letters, two that would read the same) get a short digest behind
what can be kept of them, so that a name never depends on what else is in the list.
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
from runner.spec.unknown_keys import show_value

MOST_RUNS = 10_000  # of one command
LONGEST_VALUE = 40  # characters of a value's name, less its digest
SHORTER = 16  # the same, where the whole name would be too long
DIGEST = 8  # hexadecimal digits
LONGEST_NAME = LONGEST_RUN_NAME - DIGEST - 2  # characters of the sweep's own

Swept = dict[str, Any]  # dotted key -> value


def faults(sweep: Mapping[str, Any], tables: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, message) for what cannot be swept. tables: the spec's, less [sweep]."""
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
        elif key.partition(".")[0] == "notify":  # an address may be a secret, and values stand in the runs' names
            yield (
                f"sweep.{key}",
                "all runs of a sweep send the same notifications; write it below [notify] instead of [sweep]",
            )
        elif twice := [text for text, count in Counter(map(_exact, values)).items() if count > 1]:
            found = next(value for value in values if _exact(value) == twice[0])
            yield f"sweep.{key}", f"expected each value once, got {show_value(found)} twice; remove one"
        elif wrong := _no_place(tables, key):
            yield f"sweep.{key}", wrong


def _no_place(tables: dict[str, Any], key: str) -> str | None:
    """Of a key that names an entry of a list which has not so many."""
    here: Any = tables
    parts = key.split(".")
    for number, part in enumerate(parts):
        if isinstance(here, list):
            if not (part.isdecimal() and int(part) < len(here)):
                name = ".".join(parts[:number])
                return f"expected an entry that {name} has ({name}.0 is the first of {len(here)}), got {name}.{part}"
            here = here[int(part)]
        else:
            here = here.get(part) if isinstance(here, dict) else None
    return None


def count(sweep: Mapping[str, Sequence[Any]]) -> int:
    """How many runs it asks for, without making them; 1 where nothing is swept."""
    return math.prod(len(values) for values in sweep.values())


def too_many(sweep: Mapping[str, Sequence[Any]]) -> str | None:
    """Why this sweep alone is refused, or None. Nothing is expanded for it."""
    if (asked := count(sweep)) <= MOST_RUNS:
        return None
    product = " x ".join(f"{len(values):,} of {key}" for key, values in sweep.items())
    return (
        f"asks for {asked:,} runs ({product}); at most {MOST_RUNS:,} are allowed in one command; remove values, or sweep "
        "fewer keys at a time"
    )


@dataclass(frozen=True)
class ValueName:
    """How a value stands in a run's name. earlier: as every fluxrun up to 0.1 wrote it; full: with its digest."""

    own: str
    earlier: str
    full: str


def expand(
    name: str, sweep: Mapping[str, Sequence[Any]], there: Collection[str], holds: Callable[[str, Swept], bool]
) -> Iterator[tuple[str, Swept]]:
    """(name, values) of each run. there: names of the runs in the runs folder; holds: whether the one of this name has these
    values. A run that lies there under another of its possible names keeps that: it was named by an earlier fluxrun, or
    when other values stood beside it."""
    lists = [[*zip(values, _value_names(values), strict=True)] for values in sweep.values()]
    for chosen in itertools.product(*lists):
        swept = dict(zip(sweep, (value for value, _ in chosen), strict=True))
        ways = [tuple(dict.fromkeys((one.own, one.earlier, one.full))) for _, one in chosen]
        own = _joined(name, swept, [way[0] for way in ways])
        if any(len(way) > 1 for way in ways):
            possible = (_joined(name, swept, texts) for texts in itertools.product(*ways))
            known = next((one for one in possible if one in there and holds(one, swept)), None)
            free = own if own not in there else _joined(name, swept, [one.full for _, one in chosen])
            own = known or free
        yield own, swept


def holds(spec_file: Path, swept: Swept, path_at: Callable[[str, str], Path]) -> bool:
    """Whether a run's own spec has these values; a path may stand there in full. One that cannot be read is taken to."""
    try:
        tables = tomllib.loads(spec_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True

    def same(found: Any, value: Any, key: str) -> bool:
        if isinstance(value, dict):  # defaults stand beside it
            return isinstance(found, dict) and all(same(found.get(name), one, key) for name, one in value.items())
        paths = isinstance(value, str) and isinstance(found, str) and str(path_at(value, key)) == found
        return bool(found == value) or paths

    for key, value in swept.items():
        found: Any = tables
        for part in key.split("."):
            found = (
                found[int(part)] if isinstance(found, list) else found.get(part) if isinstance(found, dict) else None
            )
        if not same(found, value, key):
            return False
    return True


def _value_names(values: Sequence[Any]) -> list[ValueName]:
    texts = [_earlier(value) for value in values]
    readable = [_is_readable(value, text) for value, text in zip(values, texts, strict=True)]
    as_written = Counter(text.lower() for value, text in zip(values, texts, strict=True) if text == value)
    same = Counter(text.lower() for text, plain in zip(texts, readable, strict=True) if plain)
    out = []
    for value, text, plain in zip(values, texts, readable, strict=True):
        if isinstance(value, int | float):
            out.append(ValueName(str(value), text, str(value)))
            continue
        alone = (as_written if text == value else same)[text.lower()] == 1
        full = _with_digest(value, LONGEST_VALUE)
        out.append(ValueName(text if plain and alone else full, text, full))
    return out


def _is_readable(value: Any, text: str) -> bool:
    """Whether the text tells enough of the value: no letter is lost, and Windows takes it."""
    return len(text) <= LONGEST_VALUE and str(value).isascii() and any(map(str.isalnum, text)) and text[-1] != "."


def _earlier(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", str(value)).strip("-") or "-"


def _with_digest(value: Any, longest: int) -> str:
    """What can be kept of the value, and what tells it from every other one."""
    plain = unicodedata.normalize("NFKD", str(value)).encode("ascii", "ignore").decode()  # a letter without its accent
    kept = _earlier(plain)[:longest].strip("-")
    digest = content_key(_exact(value))[:DIGEST]
    return f"{kept}-{digest}" if kept else digest


def _exact(value: Any) -> str:
    """The same for no two values: 1, 1.0, true and "1" differ."""
    return json.dumps(value, sort_keys=True, default=str)


def _joined(name: str, swept: Swept, texts: Sequence[str]) -> str:
    """NAME/KEY=VALUE,...; with shorter values, and at last cut, where that would be too long for a name."""
    room = LONGEST_RUN_NAME - len(name) - 1
    keys = [_earlier(key) for key in swept]
    label = ",".join(f"{key}={text}" for key, text in zip(keys, texts, strict=True))
    if len(label) > room:
        short = [
            text if len(text) <= SHORTER + DIGEST else _with_digest(value, SHORTER)
            for value, text in zip(swept.values(), texts, strict=True)
        ]
        label = ",".join(f"{key}={text}" for key, text in zip(keys, short, strict=True))
    if len(label) > room:
        label = f"{label[: max(0, room - DIGEST - 1)]}-{content_key(_exact(swept))[:DIGEST]}"
    return f"{name}/{label.lstrip('-')}"
