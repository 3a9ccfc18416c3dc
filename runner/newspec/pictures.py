"""`fluxrun new --pictures`: what a folder of pictures says of the keys of [data], and of the words to be learned."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.core.command_line import fluxrun_command as typed
from runner.core.errors import FluxrunError
from runner.data import images, sources
from runner.data.buckets import SIZE_MULTIPLE, Size, bucket_sizes, nearest_bucket
from runner.data.image_files import metadata_of
from runner.data.images import DataError, Pictures
from runner.data.metadata import IMAGE_COLUMN, columns_of
from runner.newspec.template import NewError, Values

OPTION = "--pictures"
SIDES = (1024, 768, 512)  # what FLUX.1 is trained at, as a rule; smaller pictures have a size of their own
ENLARGED = 0.1  # at most this part of the pictures may be smaller than what they are trained at
COLUMNS = ("text", "caption", "prompt")  # usual caption columns; the first one present is used
RARE = ("ohwx", "sks")  # words without a meaning that people choose
LONGEST_PROMPT = 300  # characters of a caption that is drawn as a sample


@dataclass(frozen=True)
class FolderFindings:
    """values: by dotted key, None for a key that the folder makes needless; pictures: as the spec will read them; summary: what
    there is, in one line."""

    values: dict[str, Any]
    pictures: Pictures
    summary: str


def inspect_folder(folder: Path, file: Path, template_values: Values) -> FolderFindings:
    """What a spec in `file` says of the pictures in `folder`. template_values: the template's values.

    Raises NewError.
    """
    prompt = template_values["data.prompt"]
    column, pictures = _read(folder, prompt)
    captions = [one.caption for one in pictures.items if one.caption != prompt]
    values: dict[str, Any] = {"data.source": Path(os.path.relpath(folder.resolve(), file.parent.resolve())).as_posix()}
    if column:
        values["data.caption_column"] = column
    try:
        values |= fitting_size([images.measure(one) for one in pictures.items])
    except FluxrunError as error:
        raise NewError(OPTION, str(error)) from error
    word = None
    if "tokens.name" in template_values and captions:
        words = token_words(captions)
        word = words[0] if len(words) == 1 else None
        if word is None and len(captions) == len(pictures.items):
            raise NewError(OPTION, f"all {len(captions)} pictures have a caption, and {_not_one(words)}")
    if word:
        values["tokens.name"] = word
        for key in ("data.prompt", "validate.prompts"):
            values[key] = _renamed(template_values[key], template_values["tokens.name"], word)
    if len(captions) == len(pictures.items):
        values["data.prompt"] = None
    if captions and len(captions[0]) <= LONGEST_PROMPT:
        values["validate.prompts"] = [captions[0]]
    count = len(pictures.items)
    summary = f"{count} picture{'' if count == 1 else 's'}, {len(captions)} with a caption of their own"
    if pictures.folder and (unused := len(pictures.folder.unused) + len(pictures.folder.unread)):
        summary += f"; {unused} file{' is' if unused == 1 else 's are'} not used, `{typed('check', file)}` says why"
    return FolderFindings(values, pictures, summary)


def _read(folder: Path, prompt: str) -> tuple[str | None, Pictures]:
    """(the metadata's column of captions, the pictures)."""
    try:
        columns = columns_of(metadata).split(", ") if (metadata := metadata_of(folder)) else []
        column = next((name for name in COLUMNS if name in columns), None)
        return column, sources.read_folder(folder, IMAGE_COLUMN, column, prompt)
    except DataError as error:
        raise NewError(OPTION, str(error)) from error


def fitting_size(sizes: Sequence[Size]) -> dict[str, Any]:
    """data.resolution and, where not all are square, data.buckets, so that few pictures are enlarged. sizes: (width, height)."""
    squares = [bucket_sizes(SIDES[0])[0] == nearest_bucket(size, bucket_sizes(SIDES[0])) for size in sizes]
    buckets = not all(squares)
    lengths = sorted((width * height) ** 0.5 if buckets else min(width, height) for width, height in sizes)
    common = int(lengths[int(ENLARGED * len(lengths))])
    side = next((side for side in SIDES if side <= common), max(SIZE_MULTIPLE, common // SIZE_MULTIPLE * SIZE_MULTIPLE))
    return {"data.resolution": side, **({"data.buckets": True} if buckets else {})}


def token_words(captions: Sequence[str]) -> list[str]:
    """What may be the word to be learned: in every caption, and in capitals or one of RARE; in the first one's order."""
    each = [dict.fromkeys(re.findall(r"\b[A-Za-z_]\w+", caption, re.ASCII)) for caption in captions]
    return [word for word in each[0] if (word.isupper() or word in RARE) and all(word in one for one in each)]


def _not_one(words: Sequence[str]) -> str:
    """What is wrong where the captions do not say which word is to be learned, and what to do."""
    if not words:
        return (
            "no word in capitals, like TOK, is in each; write the word to be learned into them, or take --template lora"
        )
    which = "in capitals" if all(map(str.isupper, words)) else f"in capitals, or like {RARE[0]},"
    return (
        f"several words {which} are in each ({', '.join(words)}); write all but the one to be learned in small letters, or "
        "leave --pictures out and set tokens.name and data.source in the file"
    )


def _renamed(value: Any, old: str, new: str) -> Any:
    if isinstance(value, list):
        return [_renamed(one, old, new) for one in value]
    return str(value).replace(old, new)
