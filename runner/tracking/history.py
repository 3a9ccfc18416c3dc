"""A run's numbers by step: the file `history.jsonl`, from which the results page and `compare` draw curves.

Each line is a JSON object: "step", and numbers under the names that TensorBoard shows. The file is kept in addition to
TensorBoard's event files because it is read much faster, without TensorBoard, and because it stays correct when a run
is interrupted: a line torn by a kill is dropped, lines past the checkpoint that a run resumes from are cut off, and of
two lines with the same step and name the later one counts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.core import files
from runner.runs.state import is_number

Series = dict[int, float]  # values by step, in the order of the steps


class History:
    """Writes the file. A `Tracker`, as TensorBoard and W&B are (`runner.tracking.trackers`)."""

    def __init__(self, path: Path, start: int) -> None:
        """Continue the file after step `start`; later lines, of an interrupted attempt, are removed."""
        self.path = path
        if path.is_file() and not path.is_symlink():
            kept = [line for line in _lines(path) if line["step"] <= start]
            with files.ignore_disk_errors():
                files.write_text(path, "".join(f"{json.dumps(line)}\n" for line in kept))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        line = json.dumps({"step": step, **{name: _rounded(value) for name, value in values.items()}})
        with (
            files.ignore_disk_errors()
        ):  # a gap in a curve must not stop a run; a checkpoint that cannot be written does
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                os.write(handle, f"{line}\n".encode())
            finally:
                os.close(handle)

    def picture(self, name: str, image: Any, step: int) -> None:
        """Nothing: pictures are files in the run's samples/."""

    def close(self) -> None:
        """Nothing: each line opens and closes the file."""


def read_history(path: Path) -> dict[str, Series]:
    """Every series by name; {} if there is no such file. Values that are not finite numbers are left out."""
    history: dict[str, Series] = {}
    for line in _lines(path):
        step = line.pop("step")
        for name, value in line.items():
            if is_number(value):
                history.setdefault(name, {})[step] = float(value)
    return {name: dict(sorted(series.items())) for name, series in history.items()}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole; none if there is no such file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and type(line.get("step")) is int:
                yield line


def _rounded(value: float) -> float | None:
    """Six digits; None for infinities and NaN, which JSON cannot write."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
