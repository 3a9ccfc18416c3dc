"""What a queue writes when it ends: the results page, and TensorBoard's data on the runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path


def preload() -> None:
    """Import what `publish` needs while runs train, so that it takes no time at the end."""
    with suppress(Exception):  # `publish` will meet the same error, and print it
        import_module("runner.tracking.hparams")
        import_module("runner.report.page")
        import_module("jinja2")
        for name in ("custom_scalar.layout_pb2", "hparams.summary_v2", "text.metadata"):
            import_module(f"tensorboard.plugins.{name}")
        import_module("tensorboard.summary.writer.record_writer")


def publish(runs: Path, print_line: Callable[[str], None]) -> None:
    """Write both. An error is printed and does not fail the queue: its runs are done."""
    from runner.report.page import write_report
    from runner.tracking.hparams import write_sessions

    for what, write in (("TensorBoard's data on the runs", write_sessions), ("the results page", write_report)):
        try:
            write(runs)
        except Exception as error:
            print_line(f"{what} was not written: {type(error).__name__}: {error}; the runs are not affected")
