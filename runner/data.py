"""Pictures and their captions: finding them, naming what is wrong with them, decoding and cropping. No torch."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.digest import key_of
from runner.errors import FluxrunError
from runner.files import sha256_file
from runner.seeds import derive

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Picture:
    """One training image. `name` is its path inside the data set; image and caption never part: they are one value."""

    name: str
    caption: str
    open: Callable[[], Image]


@dataclass(frozen=True)
class Pictures:
    items: tuple[Picture, ...]
    fingerprint: str

    @property
    def captions(self) -> tuple[str, ...]:
        """Distinct captions, in order of first use."""
        return tuple(dict.fromkeys(picture.caption for picture in self.items))


class DataError(Exception):
    """What is wrong with a data set, one message per finding; the caller knows the spec's line."""

    def __init__(self, *messages: str) -> None:
        super().__init__("; ".join(messages))
        self.messages = messages


def read_folder(folder: Path, image_column: str, caption_column: str | None, prompt: str | None) -> Pictures:
    """A folder of images with NAME.txt captions beside them, or an imagefolder with metadata.jsonl.

    Raises DataError with every picture that has no caption while there is no `prompt`, every line of metadata.jsonl
    that names no file, and so on. Order is by name, so it does not depend on the file system.
    """
    captions = (
        _metadata_captions(folder, caption_column)
        if (folder / METADATA).is_file()
        else {path: _side_caption(path) for path in sorted(folder.rglob("*")) if _is_image(path, folder)}
    )
    if not captions:
        raise DataError(f"no image in {folder}; wanted are files ending in {', '.join(sorted(SUFFIXES))}")
    bare = [path.relative_to(folder).as_posix() for path, caption in captions.items() if not (caption or prompt)]
    if bare:
        how = "set data.prompt, or write a NAME.txt beside each"
        if (folder / METADATA).is_file():
            how = f"set data.prompt, or data.caption_column to one of {METADATA}'s: {_columns(folder)}"
        raise DataError(f"{len(bare)} of {len(captions)} images have no caption ({_some(bare)}); {how}")
    items = [
        Picture(path.relative_to(folder).as_posix(), caption or prompt or "", _opener(path))
        for path, caption in captions.items()
    ]
    facts = [[picture.name, picture.caption, sha256_file(path)] for picture, path in zip(items, captions, strict=True)]
    return Pictures(tuple(items), key_of("folder", json.dumps(facts)))


def _is_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def _side_caption(path: Path) -> str | None:
    side = path.with_suffix(".txt")
    return " ".join(side.read_text(encoding="utf-8").split()) if side.is_file() else None


def _rows(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{folder / METADATA}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise DataError(f'{folder / METADATA}:{number}: wanted is an object with "file_name" (found {line[:60]})')
        rows.append((number, row))
    return rows


def _columns(folder: Path) -> str:
    return ", ".join(sorted({column for _, row in _rows(folder) for column in row} - {"file_name"})) or "(none)"


def _metadata_captions(folder: Path, column: str | None) -> dict[Path, str | None]:
    out: dict[Path, str | None] = {}
    faults = []
    for number, row in _rows(folder):
        path = folder / row["file_name"]
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            faults.append(f"{folder / METADATA}:{number}: no such file in the folder ({row['file_name']!r})")
            continue
        caption = row.get(column) if column else None
        if column and column not in row:
            faults.append(f"{folder / METADATA}:{number}: no column {column!r}; there are {', '.join(sorted(row))}")
        elif caption is not None and not isinstance(caption, str):
            faults.append(f"{folder / METADATA}:{number}: {column} is no text (found {caption!r})")
        out[path] = caption if isinstance(caption, str) and caption.strip() else None
    if faults:
        raise DataError(*faults)
    return out


def _opener(path: Path) -> Callable[[], Image]:
    def open_image() -> Image:
        from PIL import Image

        try:
            with Image.open(path) as image:
                image.load()
                return image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise FluxrunError(
                f"{path}: not a readable image ({error}); mend it or take it out of the folder"
            ) from error

    return open_image


def read_hub(
    source: str, config: str | None, split: str, image_column: str, caption_column: str | None, prompt: str | None
) -> Pictures:
    """Whatever `datasets` loads by name. Its content is known only once it is here, so the fingerprint is its name."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    try:
        rows = load_dataset(source, config, split=split)
    except (OSError, ValueError) as error:  # not there, no access, no network, no such split
        raise DataError(f"{source} cannot be loaded ({error})") from error
    missing = [column for column in (image_column, caption_column) if column and column not in rows.column_names]
    if missing:
        raise DataError(f"{source} has no column {missing[0]!r}; there are {', '.join(rows.column_names)}")
    rows = rows.cast_column(image_column, ImageFeature())
    captions = rows[caption_column] if caption_column else [None] * len(rows)
    bare = [str(index) for index, caption in enumerate(captions) if not (caption or prompt)]
    if bare:
        raise DataError(f"{len(bare)} of {len(rows)} rows of {source} have no caption ({_some(bare)}); set data.prompt")

    def opener(index: int) -> Callable[[], Image]:
        return lambda: rows[index][image_column]

    items = tuple(Picture(f"{index:06d}", text or prompt or "", opener(index)) for index, text in enumerate(captions))
    return Pictures(items, hub_fingerprint(source, config, split, image_column, caption_column, prompt))


def hub_fingerprint(*what: str | None) -> str:
    return key_of("hub", json.dumps(what))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def pixels(
    image: Image, name: str, size: int, *, center: bool, flip: bool, interpolation: str, seed: int
) -> np.ndarray[Any, Any]:
    """[size, size, 3] uint8: upright, shorter side resized to `size`, cropped, perhaps mirrored.

    Crop and mirror are drawn once per picture, from the seed and its name.
    """
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    upright = upright.convert("RGB")
    width, height = upright.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    upright = upright.resize((width, height), Image.Resampling[interpolation.upper()])
    draw = random.Random(derive(seed, "crop", name))
    left, top = ((width - size) // 2, (height - size) // 2)
    if not center:
        left, top = draw.randint(0, width - size), draw.randint(0, height - size)
    upright = upright.crop((left, top, left + size, top + size))
    if flip and draw.random() < 0.5:
        upright = ImageOps.mirror(upright)
    return np.asarray(upright)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(derive(seed, "order", epoch)).shuffle(order)
    return tuple(order)


def batch_indices(seed: int, step: int, micro: int, batch: int, accumulate: int, count: int) -> list[int]:
    """Which of `count` pictures a micro-batch holds: shuffled epochs laid end to end, each picture once per epoch."""
    first = (step * accumulate + micro) * batch
    return [_epoch_order(seed, k // count, count)[k % count] for k in range(first, first + batch)]
