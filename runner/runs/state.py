"""`state.json`: what a run is doing, how far it came and what it made. A foreign or damaged file is read as far as it
fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from runner.core.files import read_json

FORMAT = 1  # of state.json, plan.json, inputs.json and lease.json; older ones are read as long as they can be

Check = Callable[[object], bool]


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_number(value: object) -> bool:
    """A finite number that fits into 64 bits. Booleans pass, as Python counts them as integers."""
    return isinstance(value, int | float) and abs(value) < 2**63


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def _is_table_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _fact(check: Check) -> Any:
    """A value about the present: it is dropped with the next state."""
    return field(default=None, metadata={"check": check})


def _attempt(check: Check) -> Any:
    """A value that outlives a change of the state, as the number of attempts does."""
    return field(default=None, metadata={"check": check, "kept": "attempt"})


def _progress(check: Check) -> Any:
    """How far the run came, or what it made: true after it has ended as well."""
    return field(default=None, metadata={"check": check, "kept": "progress"})


@dataclass(frozen=True)
class RunState:
    """The fields of state.json; None where the file does not say. Times are seconds since 1970, durations seconds,
    sizes bytes.

    state: "waiting", "running", "done", "stopped" or "failed". error: why it stopped or failed. warning: what went
    wrong and cost nothing. split: parts that a micro-batch is cut into because it did not fit into memory. ended: the
    rule by which training ended early. exported_step: the step whose weights the exports hold. export_error: the
    largest of `export_errors`, which are by file. phases: by name, their "seconds" and "peak_memory_bytes". versions:
    of libraries. memory_before_models: bytes in use before any model was loaded.
    """

    state: str = field(metadata={"check": is_text})
    name: str | None = _fact(is_text)
    error: str | None = _fact(is_text)
    warning: str | None = _fact(is_text)
    format: float | None = _fact(is_number)
    updated: float | None = _fact(is_number)
    finished: float | None = _fact(is_number)

    attempts: float | None = _attempt(is_number)
    started: float | None = _attempt(is_number)
    attempt_started: float | None = _attempt(is_number)
    plan_key: str | None = _attempt(is_text)
    spec_digest: str | None = _attempt(is_text)
    steps: float | None = _attempt(is_number)
    base: str | None = _attempt(is_text)
    versions: Mapping[str, str] | None = _attempt(_is_table_of(is_text))
    split: float | None = _attempt(is_number)

    phase: str | None = _progress(is_text)
    step: float | None = _progress(is_number)
    skipped_steps: float | None = _progress(is_number)
    best_step: float | None = _progress(is_number)
    exported_step: float | None = _progress(is_number)
    peak_memory_bytes: float | None = _progress(is_number)
    memory_before_models: float | None = _progress(is_number)
    wall_s: float | None = _progress(is_number)
    s_per_step: float | None = _progress(is_number)
    train_loss: float | None = _progress(is_number)
    eval_loss: float | None = _progress(is_number)
    export_error: float | None = _progress(is_number)
    ended: str | None = _progress(is_text)
    exports: Sequence[str] | None = _progress(_is_list_of_texts)
    export_errors: Mapping[str, float] | None = _progress(_is_table_of(is_number))
    phases: Mapping[str, Mapping[str, float]] | None = _progress(_is_table_of(_is_table_of(is_number)))

    def as_json(self) -> dict[str, Any]:
        return dict(sorted(writable(vars(self)).items()))

    def attempt_facts(self) -> dict[str, Any]:
        """What the next state takes over from this one."""
        return {name: getattr(self, name) for name in _kept("attempt")}

    def progress(self) -> dict[str, Any]:
        """How far the run came and what it made."""
        return {name: getattr(self, name) for name in _kept("progress")}


def _kept(kind: str) -> list[str]:
    return [each.name for each in fields(RunState) if each.metadata.get("kept") == kind]


def writable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without None, and without losses that are infinite or not a number, which JSON cannot hold."""
    return {
        key: value
        for key, value in values.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


def read_state(path: Path) -> RunState | None:
    """The state in a file, without unknown fields and fields of the wrong kind; None where it does not name a state."""
    content = read_json(path)
    valid = {
        each.name: content[each.name]
        for each in fields(RunState)
        if each.name in content and each.metadata["check"](content[each.name])
    }
    return RunState(**valid) if "state" in valid else None
