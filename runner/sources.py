"""Where pictures come from: a folder with captions beside them, an imagefolder, or what `datasets` loads. No torch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.data import DataError, Picture, Pictures, some
from runner.digest import key_of
from runner.files import sha256_file

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
IMAGE_COLUMN = "image"  # the default, which no metadata file need have
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # theirs, whatever the name says: Pillow's EPS starts Ghostscript
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
COLUMNAR = {".parquet", ".arrow"}


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
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    column = caption_column or (image_column if image_column != IMAGE_COLUMN else None)
    if column and not metadata:
        raise DataError(
            f"{folder} has no {', '.join(METADATA)}, so no column {column!r}; add one of them, or take "
            f"data.{'caption' if caption_column else 'image'}_column out (captions then come from a NAME.txt beside each image)"
        )
    captions = (
        _metadata_captions(metadata, image_column, caption_column)
        if metadata
        else {path: _side_caption(path) for path in sorted(folder.rglob("*")) if _is_image(path, folder)}
    )
    if not captions:
        raise DataError(f"no image in {folder}; wanted are files ending in {', '.join(sorted(SUFFIXES))}")
    bare = [path.relative_to(folder).as_posix() for path, caption in captions.items() if not (caption or prompt)]
    if bare:
        how = "set data.prompt, or write a NAME.txt beside each"
        if metadata:
            how = f"set data.prompt, or data.caption_column to one of {metadata.name}'s: {_columns(metadata)}"
        raise DataError(f"{len(bare)} of {len(captions)} images have no caption ({some(bare)}); {how}")
    items = [
        Picture(path.relative_to(folder).as_posix(), str(path), caption or prompt or "", opener(path))
        for path, caption in captions.items()
    ]
    facts = [[picture.name, picture.caption, sha256_file(Path(picture.where))] for picture in items]
    return Pictures(tuple(items), key_of("folder", json.dumps(facts)))


def _is_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def _side_caption(path: Path) -> str | None:
    side = path.with_suffix(".txt")
    try:
        return " ".join(side.read_text(encoding="utf-8-sig").split()) if side.is_file() else None
    except UnicodeDecodeError as error:
        raise DataError(f"{side} is not UTF-8 ({error}); save it as UTF-8") from error


def opener(path: Path) -> Callable[[], Image]:
    def open_image() -> Image:
        from PIL import Image

        return Image.open(path, formats=FORMATS)

    return open_image


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a metadata file. Raises DataError."""
    if file.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            rows = parquet.read_table(file).to_pylist()
        except (OSError, ArrowException) as error:
            raise DataError(f"{file}: not a parquet file ({error})") from error
        yield from ((f"{file} row {index}", row) for index, row in enumerate(rows))
    elif file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            try:
                for row in reader:
                    yield f"{file}:{reader.line_num}", row
            except csv.Error as error:
                raise DataError(f"{file}:{reader.line_num}: not CSV ({error})") from error
    else:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{file}:{number}: wanted is an object (found {line[:60]})")
            yield f"{file}:{number}", row


def _columns(file: Path) -> str:
    return ", ".join(sorted({str(column) for _, row in _rows(file) for column in row} - {"file_name"})) or "(none)"


def _metadata_captions(file: Path, image_column: str, column: str | None) -> dict[Path, str | None]:
    """The column of file names is `file_name`, as `datasets` has it, or the one that data.image_column names."""
    folder = file.parent
    out: dict[Path, str | None] = {}
    faults = []
    for where, row in _rows(file):
        name = row.get(image_column) or (row.get("file_name") if image_column == IMAGE_COLUMN else None)
        if not isinstance(name, str):
            faults.append(
                f"{where}: names no file in {image_column!r}; wanted is a column file_name, or data.image_column"
            )
            continue
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            faults.append(f"{where}: no such file in the folder ({name!r})")
            continue
        if path in out:
            faults.append(f"{where}: names {name!r} a second time; give each image one row")
        caption = row.get(column) if column else None
        if column and column not in row:
            faults.append(f"{where}: no column {column!r}; there are {', '.join(sorted(map(str, row)))}")
        elif caption is not None and not isinstance(caption, str):
            faults.append(f"{where}: {column} is no text (found {caption!r})")
        out[path] = caption if isinstance(caption, str) and caption.strip() else None
    if faults:
        raise DataError(*faults)
    return out


# ---- `datasets` ----------------------------------------------------------------------------------------------------


def _is_columnar(folder: Path) -> bool:
    """A data set of `datasets` on this disk: saved by it, or parquet files with the images inside."""
    if any((folder / name).is_file() for name in METADATA) or any(
        _is_image(path, folder) for path in folder.rglob("*")
    ):
        return False
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    return saved or any(path.suffix in COLUMNAR for path in folder.rglob("*"))


def read_datasets(source: Source) -> Pictures:
    """Whatever `datasets` loads: a hub id, a parquet or arrow file, a folder of them. Raises DataError.

    It keeps its own cache of what it reads (HF_HOME). A hub data set is known by its name, a local one by its bytes.
    """
    from datasets import Image as ImageFeature

    rows = _load(source)
    wanted = (source.image_column, source.caption_column)
    missing = [column for column in wanted if column and column not in rows.column_names]
    if missing:
        raise DataError(f"{source.text} has no column {missing[0]!r}; there are {', '.join(rows.column_names)}")
    rows = rows.cast_column(source.image_column, ImageFeature(decode=False))  # opened below, in FORMATS only
    captions = list(rows[source.caption_column]) if source.caption_column else [None] * len(rows)
    odd = [str(index) for index, caption in enumerate(captions) if not isinstance(caption, str | None)]
    if odd:
        raise DataError(
            f"{source.text}: {source.caption_column} is no text (rows {some(odd)}); name another caption_column"
        )
    bare = [str(index) for index, caption in enumerate(captions) if not ((caption or "").strip() or source.prompt)]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(rows)} rows of {source.text} have no caption ({some(bare)}); set data.prompt"
        )

    def open_row(index: int) -> Callable[[], Image]:
        def open_image() -> Image:
            from PIL import Image

            image = rows[index][source.image_column]
            data = image["bytes"]
            return Image.open(io.BytesIO(data) if data is not None else image["path"], formats=FORMATS)

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
