"""The results index: one record per run, derived from the run folders, rewritten whole."""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from runner.core import files
from runner.core.notify import without_secrets
from runner.runs.run import Run, find_runs
from runner.spec.defaults import copied_from
from runner.spec.origins import DEFAULT, origins_in
from runner.spec.tables import flatten


@dataclass(frozen=True)
class Record:
    """One run. Times: seconds since 1970; wall_s: all attempts together; losses: smoothed; memory in bytes; step: how far
    training came; steps: planned ones, or those that were trained where the run is done; exported_step: whose weights the
    exports hold; export_error: the largest of any exported file (state.json has each); warning: what went wrong and cost
    nothing; ended: by which rule training ended early; split: parts that a micro-batch was cut into because it did not
    fit into the memory; spec: every key of it, dotted; origins: where those of them that are no defaults came from,
    "sweep in FILE", "set in FILE" or "extended from FILE", "unknown" where the folder does not say."""

    name: str
    state: str
    spec_digest: str | None = None
    started: float | None = None
    finished: float | None = None
    wall_s: float | None = None
    step: int | None = None
    steps: int | None = None
    s_per_step: float | None = None
    peak_memory_bytes: int | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    exports: list[str] = field(default_factory=list)
    base: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    best_step: int | None = None
    exported_step: int | None = None
    ended: str | None = None
    attempts: int | None = None
    split: int | None = None
    export_error: float | None = None
    warning: str | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def results(runs: Path | str) -> list[Record]:
    """Every run below the folder `runs`, by name."""
    return [record_of(run) for run in find_runs(Path(runs))]


def record_of(run: Run, *, with_spec: bool = True) -> Record:
    state = run.state()
    known = {key: value for key, value in state.as_json().items() if key in Record.__dataclass_fields__}
    if state.state == "done" and state.ended:
        known["steps"] = known.get("steps") if state.step is None else state.step
    spec, origins = _read_spec(run) if with_spec else ({}, {})
    return Record(**{**known, "name": run.name, "spec": spec, "origins": origins})


def sort_records(records: Iterable[Record], key: str) -> list[Record]:
    """By a field or a spec key, smallest first; runs that have no such value come last."""

    def place(record: Record) -> tuple[bool, bool, Any]:
        value = record.spec.get(key) if key in record.spec else getattr(record, key, None)
        number = isinstance(value, int | float)
        return value is None, not number, value if number else str(value)

    return sorted(records, key=place)


def write_index(runs: Path) -> None:
    left_out = ("spec", "origins")
    records = (record_of(run, with_spec=False) for run in find_runs(runs))  # after every run, so only what it holds
    rows = [{key: value for key, value in asdict(record).items() if key not in left_out} for record in records]
    files.write_text(runs / "index.jsonl", "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def table(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Flat rows with the same columns each ("eval_loss", "spec.lora.rank", ...), None where a run has no such value.

    Every column holds one kind of value, as data frames and Parquet want it: numbers, booleans or text. Lists, and a
    column that would mix kinds, are JSON text.
    """
    rows = [_flat_row(record) for record in records]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for key in columns:
        kinds = {float if type(row[key]) is int else type(row[key]) for row in rows if row.get(key) is not None}
        if len(kinds) > 1 or kinds & {list, dict}:
            for row in rows:
                row[key] = None if row.get(key) is None else json.dumps(row[key])
    return [{key: row.get(key) for key in columns} for row in rows]


def _flat_row(record: Record) -> dict[str, Any]:
    row = asdict(record)
    del row["origins"]
    for key in ("versions", "spec"):
        row |= {f"{key}.{name}": value for name, value in row.pop(key).items()}
    return row


def as_csv(records: Iterable[Record]) -> str:
    """One line per run, with every spec key that some run has as a column of its own."""
    rows = table(records)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [one.name for one in fields(Record)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _read_spec(run: Run) -> tuple[dict[str, Any], dict[str, str]]:
    """`spec` and `origins` of a record, without the name, which is the run's, and without addresses that are a secret, since
    pages are passed on; {} each where the file cannot be read."""
    try:
        text = run.spec_file.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}, {}
    found = flatten({key: value for key, value in tables.items() if key not in ("name", "fluxrun")})
    for key in ("notify.url", "notify.command"):
        if isinstance(found.get(key), str):
            found[key] = without_secrets(found[key])
    for number, token in enumerate(found.pop("tokens", [])):
        found |= {f"tokens.{number}.{key}": value for key, value in token.items()} if isinstance(token, dict) else {}
    spec = {key: value for key, value in found.items() if not isinstance(value, list) or value}
    told = origins_in(text)
    if not told:
        return spec, {key: "unknown" for key in spec if not copied_from(key, spec)}
    return spec, {key: told.get(key, "unknown") for key in spec if told.get(key) != DEFAULT}


def differing_keys(specs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all of them, in the spec's order."""
    known = [spec for spec in specs if spec]
    keys = dict.fromkeys(key for spec in known for key in spec)
    return [key for key in keys if any(spec.get(key) != known[0].get(key) for spec in known)]


def distinguishing_keys(records: Iterable[Record]) -> list[str]:
    """The differing keys that tell the runs apart: what was swept, then what was set.

    A default that differs only where one of those does follows from it, as lora.alpha does from lora.rank, and is left out.
    """
    known = [record for record in records if record.spec]
    keys = differing_keys(record.spec for record in known)
    swept = swept_keys(known)
    told = [key for key in keys if key in swept]
    told += [key for key in keys if key not in swept and any(key in record.origins for record in known)]
    groups: dict[str, list[Record]] = {}
    for record in known:
        groups.setdefault(repr([record.spec.get(key) for key in told]), []).append(record)
    alike = [[record.spec for record in group] for group in groups.values()]
    independent = {
        key for group in alike for key in differing_keys(group)
    }  # as where fluxrun's own defaults have changed
    return told + [key for key in keys if key in independent and key not in told]


def swept_keys(records: Iterable[Record]) -> set[str]:
    return {key for record in records for key, origin in record.origins.items() if origin.startswith("sweep ")}


EVALUATED_ON = ("model.base", "data.source", "data.holdout", "data.resolution", "data.prompt", "train.guidance")


def comparable_key(specs: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the eval losses are of the same pictures under the same base."""
    return not set(differing_keys(specs)) & set(EVALUATED_ON)


def short_labels(names: Sequence[str]) -> list[str]:
    """What sweeps vary: "SWEEP/lora.rank=4,train.lr=0.001" -> "rank=4, lr=0.001", after SWEEP where there are several; names as
    they are where that would make two alike."""
    sweeps = {name.partition("/")[0] for name in names if "/" in name}
    labels = []
    for name in without_tables(names):
        sweep, _, values = name.partition("/")
        short = values.replace(",", ", ")
        labels.append(name if not values else f"{sweep}: {short}" if len(sweeps) > 1 else short)
    return labels if len(set(labels)) == len(labels) else list(names)


def without_tables(names: Sequence[str]) -> list[str]:
    """ "SWEEP/lora.rank=4,train.lr=0.001" -> "SWEEP/rank=4,lr=0.001"; names as they are where that would make two alike."""
    short = [re.sub(r"(?<=[/,])(?:[a-z_0-9]+\.)+(?=[a-z_0-9]+=)", "", name) for name in names]
    return short if len(set(short)) == len(set(names)) else list(names)
