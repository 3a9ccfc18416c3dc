"""The metadata file of an imagefolder: which pictures there are, and their captions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.core.humanize import list_some
from runner.core.user_text import NotUtf8Error, decode_user_text
from runner.data.images import DataError

IMAGE_COLUMN = "image"  # the default, which no metadata file need have


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a metadata file; of a parquet file (row, row), from 0. Raises DataError."""
    if file.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            rows = parquet.read_table(file).to_pylist()
        except (OSError, ArrowException) as error:
            raise DataError(f"{file}: not a parquet file ({error})") from error
        yield from enumerate(rows)
        return
    try:
        text = decode_user_text(file.read_bytes())
    except NotUtf8Error as error:
        raise DataError(f"{file}: {error.message}") from error
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num}: not CSV ({error})") from error
        return
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: expected a JSON object, got {line[:60]}")
        yield number, row


def columns_of(file: Path) -> str:
    """Those that may hold captions, in words."""
    return ", ".join(sorted({str(column) for _, row in _rows(file) for column in row} - {"file_name"})) or "(none)"


@dataclass
class _RowFaults:
    """What is wrong with rows of a metadata file: many of one kind are one fault."""

    file: Path
    found: dict[tuple[str, str], list[tuple[int, str, str]]] = field(default_factory=dict)

    def add(self, key: str, problem: str, number: int, value: str = "", way_out: str = "") -> None:
        self.found.setdefault((key, problem), []).append((number, value, way_out))

    def messages(self) -> Iterator[tuple[str, str]]:
        """(key of the spec, message) each."""
        unit, at = ("row", " row ") if self.file.suffix == ".parquet" else ("line", ":")
        for (key, problem), rows in self.found.items():
            number, value, way_out = rows[0]
            way_out = f"; {way_out}" if way_out else ""
            if len(rows) == 1:
                yield key, f"{self.file}{at}{number}: {problem}{f', got {value}' if value else ''}{way_out}"
            else:
                first = [f"{number}{f': {value}' if value else ''}" for number, value, _ in rows]
                yield key, f"{self.file}: {problem}, in {len(rows):,} rows ({unit}s {list_some(first)}){way_out}"


def read_captions(file: Path, image_column: str, column: str | None) -> dict[Path, str | None]:
    """The caption of each picture that the file names, in its order; None where it is empty, or `column` is None.

    The column of file names is `file_name`, as `datasets` has it, or the one that data.image_column names. Raises
    DataError with every fault of every row, those of one kind as one.
    """
    folder = file.parent
    out: dict[Path, str | None] = {}
    wrong = _RowFaults(file)
    images = "data.source" if image_column == IMAGE_COLUMN else "data.image_column"
    for number, row in _rows(file):
        if column and column not in row:
            way_out = f"the columns are {', '.join(sorted(map(str, row)))}"
            wrong.add("data.caption_column", f"no column {column!r}", number, way_out=way_out)
        name = row.get(image_column) or (row.get("file_name") if image_column == IMAGE_COLUMN else None)
        if not isinstance(name, str):
            way_out = "add a column file_name, or set data.image_column"
            wrong.add(images, f"no file named in {image_column!r}", number, way_out=way_out)
            continue
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            wrong.add("data.source", "no such file in the folder", number, repr(name))
            continue
        if path in out:
            wrong.add("data.source", "a second row for a picture", number, repr(name), "give each picture one row")
        caption = row.get(column) if column else None
        if caption is not None and not isinstance(caption, str):
            wrong.add("data.caption_column", f"{column} is not text", number, repr(caption))
        out[path] = caption if isinstance(caption, str) and caption.strip() else None
    if wrong.found:
        raise DataError(*wrong.messages())
    return out
