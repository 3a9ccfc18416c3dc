"""fluxrun from Python: the results of a runs folder, for notebooks.

    import pandas, runner
    records = runner.results("runs")                          # list[runner.Record], by name; reads the run folders anew
    best = min((r for r in records if r.eval_loss), key=lambda r: r.eval_loss)
    best.name, best.spec["lora.rank"], best.exports
    frame = pandas.DataFrame(runner.table(records))           # columns "eval_loss", "spec.lora.rank", ...
    frame.to_parquet("results.parquet")

`runner.history("runs", "NAME")` gives one run's curves, {"eval/loss": {step: value}, ...};
`runner.base_folder("builtin:tiny")` is where the bundled base lies, for diffusers' `from_pretrained`. Importing this
imports nothing else: no torch, not even pydantic, before the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from runner.runs.index import Record as Record
    from runner.tracking.history import Series


__all__ = ["Record", "base_folder", "history", "results", "table"]


def results(path: Path | str) -> list[Record]:
    """Every run below the runs folder `path`, by name. Times in seconds, memory in bytes, losses smoothed."""
    from runner.runs.index import results as read

    return read(path)


def table(records: list[Record]) -> list[dict[str, Any]]:
    """Flat rows with the same columns each, every column of one kind, for a data frame."""
    from runner.runs.index import table as flatten

    return flatten(records)


def history(path: Path | str, name: str) -> dict[str, Series]:
    """One run's numbers by TensorBoard's names, each {step: value}; {} where nothing was written yet."""
    from pathlib import Path

    from runner.runs.run import Run
    from runner.tracking.history import read_history

    return read_history(Run(Path(path), name).history_file)


def base_folder(base: str) -> Path:
    """The folder of a bundled base, in diffusers' layout. Raises ValueError for any other `model.base`."""
    from runner.base.files import BUILTIN

    if base not in BUILTIN:
        raise ValueError(f"{base!r} is no bundled base; bundled are: {', '.join(BUILTIN)}")
    return BUILTIN[base]


def __getattr__(name: str) -> Any:
    if name == "Record":
        from runner.runs.index import Record

        return Record
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
