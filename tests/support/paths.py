"""The project's own folders."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).parents[2]
PICTURES = PROJECT / "specs" / "quickstart"
OLD_RUNS = PROJECT / "tests" / "old-runs"
