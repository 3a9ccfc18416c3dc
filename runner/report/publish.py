"""What a queue leaves for the morning: the results page, and what TensorBoard needs beside the numbers. No torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path


def preload() -> None:
    """Import what writing them needs, so that it is there when the last run is done."""
    with suppress(Exception):  # what is wrong with it is told when they are written
        import_module("runner.tracking.hparams")
        import_module("runner.report.page")
        import_module("jinja2")
        for name in ("custom_scalar.layout_pb2", "hparams.summary_v2", "text.metadata"):
            import_module(f"tensorboard.plugins.{name}")
        import_module("tensorboard.summary.writer.record_writer")


def publish(runs: Path, tell: Callable[[str], None]) -> None:
    """Write both. They show what is there already, so whatever is wrong with them must not fail a queue whose runs are done."""
    from runner.report.page import write_report
    from runner.tracking.hparams import write_board

    for write in (write_board, write_report):
        try:
            write(runs)
        except Exception as error:
            tell(f"{write.__name__}: {type(error).__name__}: {error}; the runs are not touched by that")
