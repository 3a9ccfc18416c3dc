"""One run as the results page shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from runner.runs.index import Record, record_of
from runner.runs.run import Run, find_runs
from runner.runs.short_names import short_labels, shortened
from runner.tracking.history import Series, read_history

MAX_NAME = 34  # characters of a run's name in the table


@dataclass(frozen=True)
class PageRun:
    """label: the run's name without what all runs share; short_label: the same, cut to MAX_NAME; series: its
    history."""

    run: Run
    record: Record
    label: str
    short_label: str
    step: int
    phase: str
    series: Mapping[str, Series]


def read_page_runs(runs: Path) -> list[PageRun]:
    folders = list(find_runs(runs))
    labels = short_labels([run.name for run in folders])
    page_runs = []
    for run, label, short_label in zip(folders, labels, shortened(labels, MAX_NAME), strict=True):
        state = run.state()
        page_runs.append(
            PageRun(
                run, record_of(run), label, short_label, state.step if type(state.step) is int else 0,
                state.phase or "", read_history(run.history_file),
            )
        )  # fmt: skip
    return page_runs


def link(path: Path, runs: Path) -> str:
    """A link from the page, which lies in `runs`. The leading "./" keeps a name like `javascript:x` from being a
    scheme."""
    return "./" + quote(path.relative_to(runs).as_posix(), errors="surrogateescape")
