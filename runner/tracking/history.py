"""A run's numbers by step, `history.jsonl`: what the results page and `compare` draw. No torch.

One JSON object a line: "step", and numbers under TensorBoard's names. Beside the event files it is there because two
hundred runs of it are read in a second, without TensorBoard, and because it survives what event files do not: a line
torn by a kill is dropped, what an interrupted attempt wrote past its checkpoint is cut off when the run goes on, and of
two lines for one step and name the later one holds.
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

Series = dict[int, float]  # by step, in their order


class History:
    """Where the trainer writes. It takes numbers as the trackers do."""

    def __init__(self, path: Path, start: int) -> None:
        """Continue the file behind step `start`."""
        self.path = path
        if path.is_file() and not path.is_symlink():
            kept = [line for line in _lines(path) if line["step"] <= start]
            with files.ignore_disk_errors():
                files.write_text(path, "".join(f"{json.dumps(line)}\n" for line in kept))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        line = json.dumps({"step": step, **{name: _short(value) for name, value in values.items()}})
        with files.ignore_disk_errors():  # a gap in a curve is no reason to stop; a checkpoint that fails is
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                os.write(handle, f"{line}\n".encode())
            finally:
                os.close(handle)

    def picture(self, name: str, image: Any, step: int) -> None:
        """Pictures are files of their own."""

    def close(self) -> None:
        """Nothing is held open."""


def read_history(path: Path) -> dict[str, Series]:
    """Every series by its name; {} where there is no such file. Values that are no finite numbers are left out."""
    found: dict[str, Series] = {}
    for line in _lines(path):
        step = line.pop("step")
        for name, value in line.items():
            if is_number(value):
                found.setdefault(name, {})[step] = float(value)
    return {name: dict(sorted(series.items())) for name, series in found.items()}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
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


def _short(value: float) -> float | None:
    """Six digits; None for what JSON has no number for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
