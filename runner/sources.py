"""Where pictures come from: a folder with captions beside them, an imagefolder, or what `datasets` loads. No torch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.data import DataError, Picture, Pictures, some
from runner.digest import key_of
from runner.files import sha256_file
from runner.picturefiles import (
    HEIC,
    READ,
    PictureFolder,
    Unused,
    look_beside,
    look_into,
    open_picture,
    unreadable_ending,
)
from runner.usertext import SAVE, NotUTF8, decode_user_text, read_user_text

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_COLUMN = "image"  # the default, which no metadata file need have
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
COLUMNAR = {".parquet", ".arrow"}
PREVIEWS = {".gif", ".avif"}  # which may lie beside the parquet files that hold a data set's pictures


@dataclass(frozen=True)
class Source:
    """What a spec's [data] says about where pictures are; `text` is a hub id or an absolute path."""

    text: str
    config: str | None
    split: str
    image_column: str
    caption_column: str | None
    prompt: str | None


def read(source: Source) -> Pictures:
    """Raises DataError with everything that is wrong. A hub id is fetched."""
    path = Path(source.text)
    if path.is_dir() and not _is_columnar(path):
        for key, found, default in (("config", source.config, None), ("split", source.split, "train")):
            if found != default:
                raise DataError(
                    f"{path} is a folder of images, which has no data.{key} (found {found!r}); take that key out"
                )
        return read_folder(path, source.image_column, source.caption_column, source.prompt)
    return read_datasets(source)


# ---- folders -------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, image_column: str, caption_column: str | None, prompt: str | None) -> Pictures:
    """A folder of images with NAME.txt captions beside them, or an imagefolder with metadata.jsonl, .csv or .parquet.

    Raises DataError with every picture that has no caption while there is no `prompt`, every row of the metadata that
    names no file, and so on. Order is by name, or the metadata's, so it does not depend on the file system.
    """
    metadata = metadata_of(folder)
    column = caption_column or (image_column if image_column != IMAGE_COLUMN else None)
    if column and not metadata:
        which = "caption" if caption_column else "image"
        raise DataError(
            (
                f"data.{which}_column",
                f"{folder} has no {', '.join(METADATA)}, so no column {column!r}; add one of them, or take "
                f"data.{which}_column out (captions then come from a NAME.txt beside each image)",
            )
        )
    if metadata:
        captions = _metadata_captions(metadata, image_column, caption_column)
        found = look_beside(metadata, captions)
    else:
        found = look_into(folder)
        captions = _side_captions(found)
    if not captions:
        endings = ", ".join(sorted({*READ, *(ending for ending in HEIC if unreadable_ending(ending) is None)}))
        told = "".join(f"; {line}" for line in reasons(found, found.unused))
        raise DataError(f"no image in {folder}; wanted are files ending in {endings}{told}")
    bare = [path.relative_to(folder).as_posix() for path, caption in captions.items() if not (caption or prompt)]
    if bare:
        how = "set data.prompt, or write a NAME.txt beside each"
        if metadata:
            how = f"set data.prompt, or data.caption_column to one of {metadata.name}'s: {_columns(metadata)}"
        told = "".join(f"; {line}" for line in reasons(found, found.unread)) if not metadata else ""
        raise DataError(f"{len(bare)} of {len(captions)} images have no caption ({some(bare)}); {how}{told}")
    items = [
        Picture(path.relative_to(folder).as_posix(), str(path), caption or prompt or "", opener(path))
        for path, caption in captions.items()
    ]
    facts = [[picture.name, picture.caption, sha256_file(Path(picture.where))] for picture in items]
    return Pictures(tuple(items), key_of("folder", json.dumps(facts)), folder=found)


def metadata_of(folder: Path) -> Path | None:
    """The file that names the pictures of an imagefolder and holds their captions."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def reasons(found: PictureFolder, left_out: Iterable[Unused]) -> list[str]:
    """A line for each reason why files are not used, with the files that it is true of."""
    by_reason: dict[str, list[str]] = {}
    for one in left_out:
        by_reason.setdefault(one.why, []).append(found.name(one.path))
    return [
        f"{some(names)}{f' ({len(names)} files)' if len(names) > 5 else ''}: {why}" for why, names in by_reason.items()
    ]


def _side_captions(found: PictureFolder) -> dict[Path, str | None]:
    """Raises DataError with every caption that cannot be read."""
    texts: dict[Path, str] = {}
    wrong: list[str] = []
    for path in dict.fromkeys(found.captions.values()):
        try:
            texts[path] = " ".join(read_user_text(path).split())
        except NotUTF8 as error:
            wrong.append(f"{path}: {error.what}")
        except OSError as error:
            wrong.append(f"{path}: {error.strerror}")
    if wrong:
        which = wrong[0] if len(wrong) == 1 else f"{len(wrong)} captions cannot be read ({some(wrong)})"
        raise DataError(f"{which}; {SAVE}" if len(wrong) == 1 else f"{which}; {SAVE.replace('the file', 'each')}")
    return {path: texts[found.captions[path]] if path in found.captions else None for path in found.pictures}


def opener(path: Path) -> Callable[[], Image]:
    def open_image() -> Image:
        return open_picture(path, path.suffix)

    return open_image


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
    except NotUTF8 as error:
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
            raise DataError(f"{file}:{number}: wanted is an object (found {line[:60]})")
        yield number, row


def _columns(file: Path) -> str:
    return ", ".join(sorted({str(column) for _, row in _rows(file) for column in row} - {"file_name"})) or "(none)"


@dataclass
class RowFaults:
    """What is wrong with rows of a metadata file: many of one kind are one fault."""

    file: Path
    found: dict[tuple[str, str], list[tuple[int, str, str]]] = field(default_factory=dict)

    def add(self, key: str, problem: str, number: int, value: str = "", way_out: str = "") -> None:
        self.found.setdefault((key, problem), []).append((number, value, way_out))

    def told(self) -> Iterator[tuple[str, str]]:
        """(key of the spec, message) each."""
        unit, at = ("row", " row ") if self.file.suffix == ".parquet" else ("line", ":")
        for (key, problem), rows in self.found.items():
            number, value, way_out = rows[0]
            way_out = f"; {way_out}" if way_out else ""
            if len(rows) == 1:
                yield key, f"{self.file}{at}{number}: {problem}{f' (found {value})' if value else ''}{way_out}"
            else:
                first = [f"{number}{f': {value}' if value else ''}" for number, value, _ in rows]
                yield key, f"{self.file}: {problem} in {len(rows):,} rows ({unit}s {some(first)}){way_out}"


def _metadata_captions(file: Path, image_column: str, column: str | None) -> dict[Path, str | None]:
    """The column of file names is `file_name`, as `datasets` has it, or the one that data.image_column names."""
    folder = file.parent
    out: dict[Path, str | None] = {}
    wrong = RowFaults(file)
    images = "data.source" if image_column == IMAGE_COLUMN else "data.image_column"
    for number, row in _rows(file):
        if column and column not in row:
            way_out = f"there are {', '.join(sorted(map(str, row)))}"
            wrong.add("data.caption_column", f"no column {column!r}", number, way_out=way_out)
        name = row.get(image_column) or (row.get("file_name") if image_column == IMAGE_COLUMN else None)
        if not isinstance(name, str):
            way_out = "wanted is a column file_name, or data.image_column"
            wrong.add(images, f"no file named in {image_column!r}", number, way_out=way_out)
            continue
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            wrong.add("data.source", "no such file in the folder", number, repr(name))
            continue
        if path in out:
            wrong.add("data.source", "a picture named a second time", number, repr(name), "give each image one row")
        caption = row.get(column) if column else None
        if caption is not None and not isinstance(caption, str):
            wrong.add("data.caption_column", f"{column} is not text", number, repr(caption))
        out[path] = caption if isinstance(caption, str) and caption.strip() else None
    if wrong.found:
        raise DataError(*wrong.told())
    return out


# ---- `datasets` ----------------------------------------------------------------------------------------------------


def _is_columnar(folder: Path) -> bool:
    """A data set of `datasets` on this disk: saved by it, or parquet files with the images inside."""
    if metadata_of(folder) or any(path.suffix.lower() not in PREVIEWS for path in look_into(folder).pictures):
        return False
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    return saved or any(path.suffix in COLUMNAR for path in folder.rglob("*"))


def read_datasets(source: Source) -> Pictures:
    """Whatever `datasets` loads: a hub id, a parquet or arrow file, a folder of them. Raises DataError.

    It keeps its own cache of what it reads (HF_HOME). A hub data set is known by its name, a local one by its bytes.
    """
    from datasets import Image as ImageFeature

    rows = _load(source)
    wanted = {"data.image_column": source.image_column, "data.caption_column": source.caption_column}
    missing = [(key, column) for key, column in wanted.items() if column and column not in rows.column_names]
    if missing:
        there = ", ".join(rows.column_names)
        raise DataError(
            *((key, f"{source.text} has no column {column!r}; there are {there}") for key, column in missing)
        )
    rows = rows.cast_column(source.image_column, ImageFeature(decode=False))  # opened below, in FORMATS only
    captions = list(rows[source.caption_column]) if source.caption_column else [None] * len(rows)
    odd = [str(index) for index, caption in enumerate(captions) if not isinstance(caption, str | None)]
    if odd:
        raise DataError(
            (
                "data.caption_column",
                f"{source.text}: {source.caption_column} is not text (rows {some(odd)}); name another column",
            )
        )
    bare = [str(index) for index, caption in enumerate(captions) if not ((caption or "").strip() or source.prompt)]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(rows)} rows of {source.text} have no caption ({some(bare)}); set data.prompt"
        )

    def open_row(index: int) -> Callable[[], Image]:
        def open_image() -> Image:
            image = rows[index][source.image_column]
            data, path = image["bytes"], Path(image["path"] or "")
            return open_picture(path if data is None else io.BytesIO(data), path.suffix)

        return open_image

    items = tuple(
        Picture(
            f"{index:06d}", f"{source.text} row {index}", (text or "").strip() or source.prompt or "", open_row(index)
        )
        for index, text in enumerate(captions)
    )
    return Pictures(items, fingerprint(source))


def _load(source: Source) -> Any:
    import datasets

    path = Path(source.text)
    try:
        if path.is_file() and path.suffix == ".arrow":
            return datasets.Dataset.from_file(str(path))
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))[source.split]
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(source.text, source.config, split=source.split)
    except (OSError, ValueError, KeyError) as error:  # not there, no access, no network, no such config or split
        raise DataError(f"{source.text} cannot be loaded ({error})") from error
    except datasets.exceptions.DatasetsError as error:
        raise DataError(f"{source.text} cannot be loaded ({error})") from error


def fingerprint(source: Source) -> str:
    """Of a data set that `datasets` reads: its bytes where it is on this disk, else its name."""
    path = Path(source.text)
    named = [source.config, source.split, source.image_column, source.caption_column, source.prompt]
    if not path.exists():
        return key_of("hub", json.dumps([source.text, *named]))
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    facts = [[os.path.relpath(one, path), sha256_file(one)] for one in files]
    return key_of("columnar", json.dumps([facts, named]))
