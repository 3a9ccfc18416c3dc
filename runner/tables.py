"""Rows of facts as tables on a terminal. No torch."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.clock import clock

SPEC_COLUMNS = 6  # of a terminal's table; --csv and the page have all
Cell = Callable[[dict[str, Any]], str]


def _plain(key: str, form: str = "") -> Cell:
    return lambda row: "" if row.get(key) is None else format(row[key], form)


def _memory(row: dict[str, Any]) -> str:
    return f"{row['peak_memory_bytes'] / 2**30:.2f} GiB" if row.get("peak_memory_bytes") else ""


def _wall(row: dict[str, Any]) -> str:
    return clock(row["wall_s"]) if row.get("wall_s") else ""


STATUS: dict[str, Cell] = {
    "run": _plain("name"),
    "state": _plain("state"),
    "phase": _plain("phase"),
    "step": lambda row: f"{row.get('step', 0)}/{row.get('steps', '?')}",
    "loss": _plain("train_loss", ".4f"),
    "s/step": _plain("s_per_step", ".3g"),
    "wall": _wall,
    "reason": _plain("error"),
}
RESULTS: dict[str, Cell] = {
    "run": _plain("name"),
    "state": _plain("state"),
    "steps": _plain("steps"),
    "train loss": _plain("train_loss", ".4f"),
    "eval loss": _plain("eval_loss", ".4f"),
    "s/step": _plain("s_per_step", ".3g"),
    "wall": _wall,
    "peak memory": _memory,
    "exports": lambda row: str(len(row["exports"])),
    "error": _plain("error"),
}


def table(rows: list[dict[str, Any]], columns: dict[str, Cell]) -> Table:
    made = Table(box=box.SIMPLE)
    for title in columns:
        made.add_column(title)
    for row in rows:
        made.add_row(*(Text(cell(row)) for cell in columns.values()))  # Text: a run's words are no markup
    return made


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process here with code 1, which fluxrun's say of runs that failed."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def console() -> Console:
    return _Console(highlight=False, width=None if sys.stdout.isatty() else 200)  # a pipe has no width to fold at


def results_table(rows: list[dict[str, Any]], spec_keys: Sequence[str]) -> Table:
    """`spec_keys`: those that are worth a column, the most telling first."""
    [run, state, *others] = RESULTS.items()
    specs = {key: _spec_cell(key) for key in spec_keys[:SPEC_COLUMNS]}
    return table(rows, dict([run, state, *specs.items(), *others]))


def _spec_cell(key: str) -> Cell:
    return lambda row: "" if row["spec"].get(key) is None else str(row["spec"][key])
