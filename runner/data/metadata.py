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

IMAGE_COLUMN = "image"  # the default of data.image_column; a metadata file need not have it
FILE_NAME = "file_name"  # the column of file names that `datasets` expects


def read_captions(file: Path, image_column: str, column: str | None) -> dict[Path, str | None]:
    """The caption of each picture that the file names, in its order; None where it is empty, or `column` is None.

    image_column: the column of file names; FILE_NAME is read where the default one is not there. Raises DataError with
    every fault of every row; faults of one kind are one message.
    """
    folder = file.parent
    captions: dict[Path, str | None] = {}
    faults = _RowFaults(file)
    for number, row in _rows(file):
        if column and column not in row:
            columns = f"the columns are {', '.join(sorted(map(str, row)))}"
            faults.add("data.caption_column", f"no column {column!r}", number, way_out=columns)
        name = row.get(image_column) or (row.get(FILE_NAME) if image_column == IMAGE_COLUMN else None)
        if not isinstance(name, str):
            key = "data.source" if image_column == IMAGE_COLUMN else "data.image_column"
            way_out = f"add a column {FILE_NAME}, or set data.image_column"
            faults.add(key, f"no file named in {image_column!r}", number, way_out=way_out)
            continue
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            faults.add("data.source", "no such file in the folder", number, repr(name))
            continue
        if path in captions:
            faults.add("data.source", "a second row for a picture", number, repr(name), "give each picture one row")
        caption = row.get(column) if column else None
        if caption is not None and not isinstance(caption, str):
            faults.add("data.caption_column", f"{column} is not text", number, repr(caption))
        captions[path] = caption if isinstance(caption, str) and caption.strip() else None
    if faults.rows:
        raise DataError(*faults.messages())
    return captions


def columns_of(file: Path) -> str:
    """The columns that may hold captions, in words. Raises DataError."""
    return ", ".join(sorted({str(column) for _, row in _rows(file) for column in row} - {FILE_NAME})) or "(none)"


@dataclass
class _RowFaults:
    """What is wrong with the rows of a metadata file. rows: by (key of the spec, problem); each (number, value, way
    out)."""

    file: Path
    rows: dict[tuple[str, str], list[tuple[int, str, str]]] = field(default_factory=dict)

    def add(self, key: str, problem: str, number: int, value: str = "", way_out: str = "") -> None:
        self.rows.setdefault((key, problem), []).append((number, value, way_out))

    def messages(self) -> Iterator[tuple[str, str]]:
        """(key of the spec, message), one for each problem."""
        unit, at = ("row", " row ") if self.file.suffix == ".parquet" else ("line", ":")
        for (key, problem), rows in self.rows.items():
            number, value, way_out = rows[0]
            way_out = f"; {way_out}" if way_out else ""
            if len(rows) == 1:
                yield key, f"{self.file}{at}{number}: {problem}{f', got {value}' if value else ''}{way_out}"
            else:
                shown = [f"{number}{f': {value}' if value else ''}" for number, value, _ in rows]
                yield key, f"{self.file}: {problem}, in {len(rows):,} rows ({unit}s {list_some(shown)}){way_out}"


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row): the number of its line, from 1, or in a parquet file of the row, from 0. Raises DataError."""
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    try:
        text = decode_user_text(file.read_bytes())
    except NotUtf8Error as error:
        raise DataError(f"{file}: {error.message}") from error
    yield from _csv_rows(file, text) if file.suffix == ".csv" else _json_rows(file, text)


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(file).to_pylist()
    except (OSError, ArrowException) as error:
        raise DataError(f"{file}: not a parquet file ({error})") from error
    yield from enumerate(rows)


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not CSV ({error})") from error


def _json_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
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
