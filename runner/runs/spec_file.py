"""`spec.toml` of a run folder: the resolved spec, with its defaults, absolute paths and the version that wrote it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from runner.core.user_text import read_user_text
from runner.spec.schema import VERSION_TABLE, Spec


def read_spec(path: Path) -> Spec:
    """Raises OSError, ValueError or RecursionError where the file cannot be read as a spec."""
    return Spec.model_validate(read_spec_tables(path))


def read_spec_tables(path: Path) -> dict[str, Any]:
    """The TOML tables without the one that names fluxrun's version. Raises like `read_spec`."""
    tables = tomllib.loads(read_user_text(path))
    tables.pop(VERSION_TABLE, None)
    return tables
