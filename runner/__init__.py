"""fluxrun from Python: the results of a runs folder, for notebooks.

    import pandas, runner
    records = runner.results("runs")                          # list[runner.Record], by name; reads the run folders anew
    best = min((r for r in records if r.eval_loss), key=lambda r: r.eval_loss)
    best.name, best.spec["lora.rank"], best.exports
    frame = pandas.DataFrame(runner.table(records))           # columns "eval_loss", "spec.lora.rank", ...
    frame.to_parquet("results.parquet")

`runner.history("runs", "NAME")` gives one run's curves, {"eval/loss": {step: value}, ...}. Importing this imports nothing
else: no torch, not even pydantic, before the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from runner.index import Record as Record
    from runner.series import Series

__all__ = ["Record", "history", "results", "table"]


def results(path: Path | str) -> list[Record]:
    """Every run below the runs folder `path`, by name. Times in seconds, memory in bytes, losses smoothed."""
    from runner.index import results as read

    return read(path)


def table(records: list[Record]) -> list[dict[str, Any]]:
    """Flat rows with the same columns each, every column of one kind, for a data frame."""
    from runner.index import table as flatten

    return flatten(records)


def history(path: Path | str, name: str) -> dict[str, Series]:
    """One run's numbers by TensorBoard's names, each {step: value}; {} where nothing was written yet."""
    from pathlib import Path

    from runner.rundir import Run
    from runner.series import read_history

    return read_history(Run(Path(path), name).history_file)


def __getattr__(name: str) -> Any:
    if name == "Record":
        from runner.index import Record

        return Record
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
