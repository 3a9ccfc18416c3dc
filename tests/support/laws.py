"""What the tests with hypothesis share: how many examples, and specs from tables."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import HealthCheck, settings

from runner.spec.build import LoadedSpec
from runner.spec.loader import load


def examples(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def put(tables: dict[str, Any], key: str, value: Any) -> None:
    *names, last = key.split(".")
    table: Any = tables
    for name in names:
        table = table.setdefault(name, {})
        table = table[0] if isinstance(table, list) else table
    table[last] = copy.deepcopy(value)


def loaded(tables: dict[str, Any] | str) -> list[LoadedSpec]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.toml"
        path.write_text(tables if isinstance(tables, str) else tomli_w.dumps(tables))
        return load([path])
