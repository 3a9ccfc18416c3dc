"""`fluxrun new --pictures`: what a folder of pictures says about the keys of [data] and about the words to be
learned."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.core.command_line import fluxrun_command
from runner.core.errors import FluxrunError
from runner.core.humanize import pluralize
from runner.data import images, sources
from runner.data.buckets import SIZE_MULTIPLE, Size, bucket_sizes, nearest_bucket
from runner.data.image_files import metadata_of
from runner.data.images import DataError, Pictures
from runner.data.metadata import IMAGE_COLUMN, columns_of
from runner.newspec.template import NewError
from runner.newspec.template_tables import Values

OPTION = "--pictures"
SIDES = (1024, 768, 512)  # usual sizes to train FLUX.1 at; smaller pictures get a size of their own
MOST_ENLARGED = 0.1  # fraction of the pictures that may be smaller than what they are trained at
CAPTION_COLUMNS = ("text", "caption", "prompt")  # usual names in metadata files
RARE_WORDS = ("ohwx", "sks")  # words without a meaning that people choose for concepts
LONGEST_PROMPT = 300  # characters of a caption that is used as a sample prompt


@dataclass(frozen=True)
class FolderFindings:
    """values: by dotted key, None for a key that this folder makes needless; pictures: as the spec will read them;
    summary: the folder in one line."""

    values: dict[str, Any]
    pictures: Pictures
    summary: str


def inspect_folder(folder: Path, file: Path, written: Values) -> FolderFindings:
    """What a spec in `file` should say about the pictures in `folder`. written: the template's values. Raises
    NewError."""
    prompt = written["data.prompt"]
    column, pictures = _read(folder, prompt)
    captions = [picture.caption for picture in pictures.items if picture.caption != prompt]
    all_captioned = len(captions) == len(pictures.items)
    source = Path(os.path.relpath(folder.resolve(), file.parent.resolve())).as_posix()
    values: dict[str, Any] = {"data.source": source, **({"data.caption_column": column} if column else {})}
    try:
        values |= fitting_size([images.measure(picture) for picture in pictures.items])
    except FluxrunError as error:
        raise NewError(OPTION, str(error)) from error
    if "tokens.name" in written and captions:
        words = token_words(captions)
        if len(words) == 1:
            values |= _with_token(written, words[0])
        elif all_captioned:
            raise NewError(OPTION, f"all {len(captions)} pictures have a caption, and {_not_one(words)}")
    if all_captioned:
        values["data.prompt"] = None
    if captions and len(captions[0]) <= LONGEST_PROMPT:
        values["validate.prompts"] = [captions[0]]
    return FolderFindings(values, pictures, _summary(pictures, len(captions), file))


def _read(folder: Path, prompt: str) -> tuple[str | None, Pictures]:
    """(the metadata's column of captions, the pictures)."""
    try:
        columns = columns_of(metadata).split(", ") if (metadata := metadata_of(folder)) else []
        column = next((name for name in CAPTION_COLUMNS if name in columns), None)
        return column, sources.read_folder(folder, IMAGE_COLUMN, column, prompt)
    except DataError as error:
        raise NewError(OPTION, str(error)) from error


def _summary(pictures: Pictures, captions: int, file: Path) -> str:
    summary = f"{pluralize(len(pictures.items), 'picture')}, {captions} with a caption of their own"
    if pictures.folder and (unused := len(pictures.folder.unused) + len(pictures.folder.unread)):
        are = "is" if unused == 1 else "are"
        summary += f"; {pluralize(unused, 'file')} {are} not used, `{fluxrun_command('check', file)}` says why"
    return summary


def fitting_size(sizes: Sequence[Size]) -> dict[str, Any]:
    """data.resolution, and data.buckets where not all pictures are square, so that few are enlarged. sizes: (width,
    height)."""
    squares = [bucket_sizes(SIDES[0])[0] == nearest_bucket(size, bucket_sizes(SIDES[0])) for size in sizes]
    buckets = not all(squares)
    lengths = sorted((width * height) ** 0.5 if buckets else min(width, height) for width, height in sizes)
    common = int(lengths[int(MOST_ENLARGED * len(lengths))])
    side = next((side for side in SIDES if side <= common), max(SIZE_MULTIPLE, common // SIZE_MULTIPLE * SIZE_MULTIPLE))
    return {"data.resolution": side, **({"data.buckets": True} if buckets else {})}


def token_words(captions: Sequence[str]) -> list[str]:
    """Candidates for the word to be learned: in every caption, and in capitals or one of RARE_WORDS; in the first one's
    order."""
    words = [dict.fromkeys(re.findall(r"\b[A-Za-z_]\w+", caption, re.ASCII)) for caption in captions]
    candidates = [word for word in words[0] if word.isupper() or word in RARE_WORDS]
    return [word for word in candidates if all(word in others for others in words)]


def _with_token(written: Values, word: str) -> dict[str, Any]:
    """The template's values that name its token, with this word instead."""

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(text) for text in value]
        return str(value).replace(written["tokens.name"], word)

    return {"tokens.name": word, **{key: renamed(written[key]) for key in ("data.prompt", "validate.prompts")}}


def _not_one(words: Sequence[str]) -> str:
    """Why the captions do not say which word is to be learned, and what to do."""
    if not words:
        return (
            "no word in capitals, like TOK, is in each; write the word to be learned into them, or take --template lora"
        )
    kind = "in capitals" if all(map(str.isupper, words)) else f"in capitals, or like {RARE_WORDS[0]},"
    return (
        f"several words {kind} are in each ({', '.join(words)}); write all but the one to be learned in small letters, or "
        "leave --pictures out and set tokens.name and data.source in the file"
    )
