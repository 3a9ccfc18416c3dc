"""Where pictures come from: a folder with captions beside them, an imagefolder, or what `datasets` loads."""

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
from runner.data.image_files import (
    FORMAT_BY_ENDING,
    HEIC,
    METADATA,
    PictureFolder,
    Unused,
    metadata_of,
    open_picture,
    scan_folder,
    scan_siblings,
    unreadable_ending,
)
from runner.data.images import DataError, Picture, Pictures
from runner.data.metadata import IMAGE_COLUMN, columns_of, read_captions

if TYPE_CHECKING:
    from PIL.Image import Image


COLUMNAR = {".parquet", ".arrow"}
PREVIEWS = {".gif", ".avif"}  # which may lie beside the parquet files that hold a data set's pictures


@dataclass(frozen=True)
class DatasetSource:
    """What a spec's [data] says about where pictures are; `text` is a hub id or an absolute path."""

    text: str
    config: str | None
    split: str
    image_column: str
    caption_column: str | None
    prompt: str | None


def read_source(source: DatasetSource) -> Pictures:
    """Raises DataError with everything that is wrong. A hub id is fetched; raises UnreachableError where the hub does
    not answer."""
    path = Path(source.text)
    if path.is_dir() and not _is_columnar(path):
        for key, found, default in (("config", source.config, None), ("split", source.split, "train")):
            if found != default:
                raise DataError(
                    f"{path} is a folder of images, which has no data.{key}, got {found!r}; remove that key"
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
                f"{folder} has no {', '.join(METADATA)}, so no column {column!r}; add one of them, or remove "
                f"data.{which}_column (captions then come from a NAME.txt beside each image)",
            )
        )
    if metadata:
        captions = read_captions(metadata, image_column, caption_column)
        found = scan_siblings(metadata, captions)
    else:
        found = scan_folder(folder)
        captions = _side_captions(found)
    if not captions:
        endings = ", ".join(
            sorted({*FORMAT_BY_ENDING, *(ending for ending in HEIC if unreadable_ending(ending) is None)})
        )
        why_unused = "".join(f"; {line}" for line in reasons(found, found.unused))
        raise DataError(f"no image in {folder}; expected files that end in {endings}{why_unused}")
    bare = [path.relative_to(folder).as_posix() for path, caption in captions.items() if not (caption or prompt)]
    if bare:
        how = "set data.prompt, or write a NAME.txt beside each"
        if metadata:
            how = f"set data.prompt, or data.caption_column to one of {metadata.name}'s: {columns_of(metadata)}"
        why_unused = "".join(f"; {line}" for line in reasons(found, found.unread)) if not metadata else ""
        raise DataError(f"{len(bare)} of {len(captions)} images have no caption ({list_some(bare)}); {how}{why_unused}")
    items = [
        Picture(
            path.relative_to(folder).as_posix(), str(path), caption or prompt or "", opener(path), sha256_file(path)
        )
        for path, caption in captions.items()
    ]
    facts = [[picture.name, picture.caption, picture.digest] for picture in items]
    return Pictures(tuple(items), content_key("folder", json.dumps(facts)), folder=found)


def reasons(found: PictureFolder, left_out: Iterable[Unused]) -> list[str]:
    """A line for each reason why files are not used, with the files that it is true of."""
    by_reason: dict[str, list[str]] = {}
    for one in left_out:
        by_reason.setdefault(one.why, []).append(found.name(one.path))
    return [
        f"{list_some(names)}{f' ({len(names)} files)' if len(names) > 5 else ''}: {why}"
        for why, names in by_reason.items()
    ]


def _side_captions(found: PictureFolder) -> dict[Path, str | None]:
    """Raises DataError with every caption that cannot be read."""
    texts: dict[Path, str] = {}
    wrong: list[str] = []
    for path in dict.fromkeys(found.captions.values()):
        try:
            texts[path] = " ".join(read_user_text(path).split())
        except NotUtf8Error as error:
            wrong.append(f"{path}: {error.what}")
        except OSError as error:
            wrong.append(f"{path}: {error.strerror}")
    if wrong:
        which = wrong[0] if len(wrong) == 1 else f"{len(wrong)} captions cannot be read ({list_some(wrong)})"
        raise DataError(
            f"{which}; {UTF8_ADVICE}" if len(wrong) == 1 else f"{which}; {UTF8_ADVICE.replace('the file', 'each')}"
        )
    return {path: texts[found.captions[path]] if path in found.captions else None for path in found.pictures}


def opener(path: Path) -> Callable[[], Image]:
    def open_image() -> Image:
        return open_picture(path, path.suffix)

    return open_image


# ---- `datasets` ----------------------------------------------------------------------------------------------------


def _is_columnar(folder: Path) -> bool:
    """A data set of `datasets` on this disk: saved by it, or parquet files with the images inside."""
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    if metadata_of(folder) or not (saved or any(path.suffix in COLUMNAR for path in folder.rglob("*"))):
        return False
    return all(path.suffix.lower() in PREVIEWS for path in scan_folder(folder).pictures)


def read_datasets(source: DatasetSource) -> Pictures:
    """Whatever `datasets` loads: a hub id, a parquet or arrow file, a folder of them. Raises DataError.

    It keeps its own cache of what it reads (HF_HOME). A hub data set is known by its name, a local one by its bytes.
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
    rows = rows.cast_column(source.image_column, ImageFeature(decode=False))  # opened below, in FORMATS only
    captions = list(rows[source.caption_column]) if source.caption_column else [None] * len(rows)
    odd = [str(index) for index, caption in enumerate(captions) if not isinstance(caption, str | None)]
    if odd:
        raise DataError(
            (
                "data.caption_column",
                f"{source.text}: the column {source.caption_column} is not text (rows {list_some(odd)}); name another column",
            )
        )
    bare = [str(index) for index, caption in enumerate(captions) if not ((caption or "").strip() or source.prompt)]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(rows)} rows of {source.text} have no caption ({list_some(bare)}); set data.prompt"
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
    return Pictures(items, source_fingerprint(source))


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
        # Not there, no access, no such config or split, no network: `datasets` and the hub's client have a kind for
        # each.
        if not path.exists() and not hub.offline() and hub.is_transient(error):
            raise UnreachableError(
                f"{source.text} cannot be loaded: the hub does not answer ({hub.describe_error(error)})"
            ) from error
        raise DataError(f"{source.text} cannot be loaded ({error})") from error


def source_fingerprint(source: DatasetSource) -> str:
    """Of a data set that `datasets` reads: its bytes where it is on this disk, else its name."""
    path = Path(source.text)
    named = [source.config, source.split, source.image_column, source.caption_column, source.prompt]
    if not path.exists():
        return content_key("hub", json.dumps([source.text, *named]))
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    facts = [[os.path.relpath(one, path), sha256_file(one)] for one in files]
    return content_key("columnar", json.dumps([facts, named]))
