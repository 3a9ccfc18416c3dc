"""What stands in state.json and its like: read as what it ought to be, whoever wrote it. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runner.core.files import read_json


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 2**63  # no NaN either


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def _table_of(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


# How far a run came and what it made: true after it has ended, too. The rest of a state is about the present.
PROGRESS_FIELDS: dict[str, Callable[[object], bool]] = {
    "phase": is_text,
    **dict.fromkeys(("step", "skipped_steps", "best_step", "exported_step", "peak_memory_bytes"), is_number),
    "memory_before_models": is_number,
    **dict.fromkeys(("wall_s", "s_per_step", "train_loss", "eval_loss", "export_error"), is_number),
    "ended": is_text,
    "exports": _texts,
    "export_errors": _table_of(is_number),
    "phases": _table_of(_table_of(is_number)),
}
STATE_FIELDS: dict[str, Callable[[object], bool]] = {
    **PROGRESS_FIELDS,
    **dict.fromkeys(("state", "name", "error", "warning", "plan_key", "spec_digest", "base"), is_text),
    **dict.fromkeys(
        ("format", "attempts", "split", "steps", "started", "attempt_started", "finished", "updated"), is_number
    ),
    "versions": _table_of(is_text),
}


def json_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Less what is not there: None, and losses that are no number, for which JSON has no word."""
    return {
        key: value
        for key, value in state.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


def read_state(path: Path) -> dict[str, Any]:
    """state.json, less what is not of the kind that belongs there; {} where it does not even say the state."""
    found = {key: value for key, value in read_json(path).items() if key in STATE_FIELDS and STATE_FIELDS[key](value)}
    return found if "state" in found else {}
