"""What a queue leaves for the morning: the results page, and what TensorBoard needs beside the numbers. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def prepare_morning(runs: Path, tell: Callable[[str], None]) -> None:
    """Write both. They show what is there already, so whatever is wrong with them must not fail a queue whose runs are done."""
    from runner.board import write_board
    from runner.report import write_report

    for write in (write_board, write_report):
        try:
            write(runs)
        except Exception as error:
            tell(f"{write.__name__}: {type(error).__name__}: {error}; the runs are not touched by that")
