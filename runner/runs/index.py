"""The results index: one record per run, read from the run folders and written as a whole."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Iterable
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
    """One run. Times are seconds since 1970, durations seconds, sizes bytes; losses are smoothed.

    wall_s: of all attempts together. step: how far training came. steps: the planned ones, or those that were trained
    if the run is done. exported_step: the step whose weights the exports hold. export_error: the largest of any
    exported file; state.json has each. warning: what went wrong and cost nothing. ended: the rule by which training
    ended early. split: parts that a micro-batch was cut into because it did not fit into memory. spec: all of its keys,
    dotted. origins: where those that are no defaults came from: "sweep in FILE", "set in FILE", "extended from FILE",
    or "unknown" where the folder does not say.
    """

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
    facts = {key: value for key, value in state.as_json().items() if key in Record.__dataclass_fields__}
    if state.state == "done" and state.ended:
        facts["steps"] = facts.get("steps") if state.step is None else state.step
    spec, origins = _read_spec(run) if with_spec else ({}, {})
    return Record(**{**facts, "name": run.name, "spec": spec, "origins": origins})


def _read_spec(run: Run) -> tuple[dict[str, Any], dict[str, str]]:
    """(spec, origins) of a record; ({}, {}) where the file cannot be read. Without the name, which is the run's, and
    without secrets in addresses, because reports are passed on."""
    try:
        text = run.spec_file.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}, {}
    values = flatten({key: value for key, value in tables.items() if key not in ("name", "fluxrun")})
    for key in ("notify.url", "notify.command"):
        if isinstance(values.get(key), str):
            values[key] = without_secrets(values[key])
    for number, token in enumerate(values.pop("tokens", [])):
        values |= {f"tokens.{number}.{key}": value for key, value in token.items()} if isinstance(token, dict) else {}
    spec = {key: value for key, value in values.items() if not isinstance(value, list) or value}
    origins = origins_in(text)
    if not origins:
        return spec, {key: "unknown" for key in spec if not copied_from(key, spec)}
    return spec, {key: origins.get(key, "unknown") for key in spec if origins.get(key) != DEFAULT}


def sort_records(records: Iterable[Record], key: str) -> list[Record]:
    """By a field of Record or a spec key, smallest first, numbers before text. Runs without such a value come last."""

    def rank(record: Record) -> tuple[bool, bool, Any]:
        value = record.spec.get(key) if key in record.spec else getattr(record, key, None)
        is_number = isinstance(value, int | float)
        return value is None, not is_number, value if is_number else str(value)

    return sorted(records, key=rank)


def write_index(runs: Path) -> None:
    """Write RUNS/index.jsonl, without specs. It is written after every run, so it reads no more than it needs."""
    left_out = ("spec", "origins")
    records = (record_of(run, with_spec=False) for run in find_runs(runs))
    rows = [{key: value for key, value in asdict(record).items() if key not in left_out} for record in records]
    files.write_text(runs / "index.jsonl", "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


# ---- as a table ------------------------------------------------------------------------------------------------------


def table(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Flat rows with the same columns each ("eval_loss", "spec.lora.rank", ...), None where a run has no such value.

    Every column holds values of one kind, as data frames and Parquet need it: numbers, booleans or text. Lists, and
    columns that would mix kinds, become JSON text.
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
    """One line per run, with a column for every spec key that some run has."""
    rows = table(records)
    columns = list(rows[0]) if rows else [each.name for each in fields(Record)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
