"""Reading a data set: a folder with captions beside the pictures, an imagefolder, or what `datasets` loads."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.core import hub
from runner.core.errors import UnreachableError
from runner.core.hashing import content_key, sha256_file
from runner.core.humanize import list_some
from runner.core.user_text import UTF8_ADVICE, NotUtf8Error, read_user_text
from runner.data.image_files import METADATA, PictureFolder, Unused, metadata_of, scan_folder, scan_siblings
from runner.data.image_formats import FORMAT_BY_ENDING, HEIC, open_picture, unreadable_ending
from runner.data.images import DataError, Picture, Pictures
from runner.data.metadata import IMAGE_COLUMN, columns_of, read_captions

if TYPE_CHECKING:
    from PIL.Image import Image


COLUMNAR = {".parquet", ".arrow"}
PREVIEWS = {".gif", ".avif"}  # allowed beside the parquet files that hold a data set's pictures


@dataclass(frozen=True)
class DatasetSource:
    """What [data] of a spec says about where pictures are. text: a hub id or an absolute path; the others: as in the
    spec."""

    text: str
    config: str | None
    split: str
    image_column: str
    caption_column: str | None
    prompt: str | None


def read_source(source: DatasetSource) -> Pictures:
    """A hub id is downloaded. Raises DataError with all faults, UnreachableError where the hub does not answer."""
    path = Path(source.text)
    if not path.is_dir() or _is_columnar(path):
        return read_datasets(source)
    for key, value, default in (("config", source.config, None), ("split", source.split, "train")):
        if value != default:
            raise DataError(f"{path} is a folder of images, which has no data.{key}, got {value!r}; remove that key")
    return read_folder(path, source.image_column, source.caption_column, source.prompt)


# ---- folders -------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, image_column: str, caption_column: str | None, prompt: str | None) -> Pictures:
    """A folder of images with NAME.txt captions beside them, or an imagefolder with metadata.jsonl, .csv or .parquet.

    Pictures are in the order of their names, or of the metadata, whatever the file system's order is. Raises DataError
    with all faults: pictures without a caption where there is no `prompt`, rows of the metadata that name no file, and
    so on.
    """
    metadata = metadata_of(folder)
    if not metadata:
        _refuse_columns(folder, image_column, caption_column)
        found = scan_folder(folder)
        captions = _side_captions(found)
    else:
        captions = read_captions(metadata, image_column, caption_column)
        found = scan_siblings(metadata, captions)
    if not captions:
        endings = ", ".join(
            sorted({*FORMAT_BY_ENDING, *(ending for ending in HEIC if unreadable_ending(ending) is None)})
        )
        unused = "".join(f"; {line}" for line in reasons(found, found.unused))
        raise DataError(f"no image in {folder}; expected files that end in {endings}{unused}")
    if not prompt:
        _refuse_uncaptioned(found, captions, metadata)
    items = [
        Picture(
            path.relative_to(folder).as_posix(), str(path), caption or prompt or "", opener(path), sha256_file(path)
        )
        for path, caption in captions.items()
    ]
    facts = [[picture.name, picture.caption, picture.digest] for picture in items]
    return Pictures(tuple(items), content_key("folder", json.dumps(facts)), folder=found)


def _refuse_columns(folder: Path, image_column: str, caption_column: str | None) -> None:
    """Raises DataError where a column is set, in a folder without metadata."""
    if caption_column:
        key, column = "data.caption_column", caption_column
    elif image_column != IMAGE_COLUMN:
        key, column = "data.image_column", image_column
    else:
        return
    message = (
        f"{folder} has no {', '.join(METADATA)}, so no column {column!r}; add one of them, or remove {key} (captions then come "
        "from a NAME.txt beside each image)"
    )
    raise DataError((key, message))


def _refuse_uncaptioned(found: PictureFolder, captions: dict[Path, str | None], metadata: Path | None) -> None:
    """Raises DataError where a picture has no caption."""
    uncaptioned = [found.name(path) for path, caption in captions.items() if not caption]
    if not uncaptioned:
        return
    if metadata:
        way_out = f"set data.prompt, or data.caption_column to one of {metadata.name}'s: {columns_of(metadata)}"
    else:
        unread = "".join(f"; {line}" for line in reasons(found, found.unread))
        way_out = f"set data.prompt, or write a NAME.txt beside each{unread}"
    raise DataError(
        f"{len(uncaptioned)} of {len(captions)} images have no caption ({list_some(uncaptioned)}); {way_out}"
    )


def reasons(folder: PictureFolder, unused: Iterable[Unused]) -> list[str]:
    """A line for each reason why files are not read, with the files that it applies to."""
    by_reason: dict[str, list[str]] = {}
    for each in unused:
        by_reason.setdefault(each.reason, []).append(folder.name(each.path))
    return [
        f"{list_some(names)}{f' ({len(names)} files)' if len(names) > 5 else ''}: {reason}"
        for reason, names in by_reason.items()
    ]


def _side_captions(folder: PictureFolder) -> dict[Path, str | None]:
    """The caption of each picture, on one line. Raises DataError with every caption file that cannot be read."""
    texts: dict[Path, str] = {}
    faults: list[str] = []
    for path in dict.fromkeys(folder.captions.values()):
        try:
            texts[path] = " ".join(read_user_text(path).split())
        except NotUtf8Error as error:
            faults.append(f"{path}: {error.what}")
        except OSError as error:
            faults.append(f"{path}: {error.strerror}")
    if len(faults) == 1:
        raise DataError(f"{faults[0]}; {UTF8_ADVICE}")
    if faults:
        raise DataError(
            f"{len(faults)} captions cannot be read ({list_some(faults)}); {UTF8_ADVICE.replace('the file', 'each')}"
        )
    return {path: texts[folder.captions[path]] if path in folder.captions else None for path in folder.pictures}


def opener(path: Path) -> Callable[[], Image]:
    """The `open` of a Picture."""

    def open_image() -> Image:
        return open_picture(path, path.suffix)

    return open_image


# ---- `datasets` ----------------------------------------------------------------------------------------------------


def _is_columnar(folder: Path) -> bool:
    """Whether a folder is a data set of `datasets`: saved by it, or parquet files with the images inside."""
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    if metadata_of(folder) or not (saved or any(path.suffix in COLUMNAR for path in folder.rglob("*"))):
        return False
    return all(path.suffix.lower() in PREVIEWS for path in scan_folder(folder).pictures)


def read_datasets(source: DatasetSource) -> Pictures:
    """What `datasets` loads: a hub id, a parquet or arrow file, a folder of them. Raises DataError and
    UnreachableError.

    `datasets` keeps its own cache of what it reads, in HF_HOME.
    """
    from datasets import Image as ImageFeature

    rows = _load(source)
    wanted = {"data.image_column": source.image_column, "data.caption_column": source.caption_column}
    missing = [(key, column) for key, column in wanted.items() if column and column not in rows.column_names]
    if missing:
        columns = ", ".join(rows.column_names)
        raise DataError(
            *((key, f"{source.text} has no column {column!r}; the columns are {columns}") for key, column in missing)
        )
    rows = rows.cast_column(source.image_column, ImageFeature(decode=False))  # opened below, by the decoders allowed
    captions = _column_captions(source, rows)

    def open_row(index: int) -> Callable[[], Image]:
        def open_image() -> Image:
            image = rows[index][source.image_column]
            data, path = image["bytes"], Path(image["path"] or "")
            return open_picture(path if data is None else io.BytesIO(data), path.suffix)

        return open_image

    items = tuple(
        Picture(f"{index:06d}", f"{source.text} row {index}", caption, open_row(index))
        for index, caption in enumerate(captions)
    )
    return Pictures(items, source_fingerprint(source))


def _column_captions(source: DatasetSource, rows: Any) -> list[str]:
    """The caption of each row, or the prompt. Raises DataError."""
    texts = list(rows[source.caption_column]) if source.caption_column else [None] * len(rows)
    if not_text := [str(index) for index, text in enumerate(texts) if not isinstance(text, str | None)]:
        message = (
            f"{source.text}: the column {source.caption_column} is not text (rows {list_some(not_text)}); "
            "name another column"
        )  # fmt: skip
        raise DataError(("data.caption_column", message))
    captions = [(text or "").strip() or source.prompt or "" for text in texts]
    if uncaptioned := [str(index) for index, caption in enumerate(captions) if not caption]:
        raise DataError(
            f"{len(uncaptioned)} of {len(rows)} rows of {source.text} have no caption ({list_some(uncaptioned)}); set data.prompt"
        )
    return captions


def _load(source: DatasetSource) -> Any:
    import datasets

    path = Path(source.text)
    try:
        if not path.exists():
            hub.set_up_client(hub.ANSWER_TIMEOUT)
        if path.is_file() and path.suffix == ".arrow":
            return datasets.Dataset.from_file(str(path))
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))[source.split]
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(source.text, source.config, split=source.split)
    except Exception as error:
        # Not there, no access, no such config or split, no network: `datasets` and the hub's client have an error for
        # each.
        if not path.exists() and not hub.offline() and hub.is_transient(error):
            raise UnreachableError(
                f"{source.text} cannot be loaded: the hub does not answer ({hub.describe_error(error)})"
            ) from error
        raise DataError(f"{source.text} cannot be loaded ({error})") from error


def source_fingerprint(source: DatasetSource) -> str:
    """Of a data set that `datasets` reads: of its bytes where it is on this disk, else of its name."""
    path = Path(source.text)
    settings = [source.config, source.split, source.image_column, source.caption_column, source.prompt]
    if not path.exists():
        return content_key("hub", json.dumps([source.text, *settings]))
    files = [path] if path.is_file() else sorted(inside for inside in path.rglob("*") if inside.is_file())
    facts = [[os.path.relpath(file, path), sha256_file(file)] for file in files]
    return content_key("columnar", json.dumps([facts, settings]))
