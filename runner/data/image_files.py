"""Sorts the files of a folder into pictures, captions and unused files, with the reason for each unused one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.data.image_formats import FORMAT_BY_ENDING, unreadable_ending

CAPTION = ".txt"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first of these in the folder itself is read
LIKE_METADATA = {
    f"{stem}{ending}"
    for stem in ("metadata", "captions")
    for ending in (".jsonl", ".csv", ".parquet", ".json", ".tsv", ".xlsx")
}
LIKE_A_CAPTION = {
    *(".cap", ".caption", ".captions", ".doc", ".docx", ".json", ".md", ".prompt"),
    *(".rtf", ".tag", ".tags", ".text", ".xml", ".yaml", ".yml"),
}
NOT_UTF8_NAME = "its name is not UTF-8; rename it"


@dataclass(frozen=True)
class Unused:
    """A file that is not read, and the reason in words."""

    path: Path
    reason: str


@dataclass(frozen=True)
class PictureFolder:
    """What is in a folder.

    captions: of the pictures that have one, the caption's file; unused: files that look like pictures and are not read;
    unread: files that look like captions and are not read; orphan_captions: captions without a picture;
    shared_captions: pictures that have the same caption file.
    """

    folder: Path
    pictures: tuple[Path, ...]
    captions: Mapping[Path, Path] = field(default_factory=dict)
    unused: tuple[Unused, ...] = ()
    unread: tuple[Unused, ...] = ()
    orphan_captions: tuple[Path, ...] = ()
    shared_captions: tuple[tuple[Path, ...], ...] = ()

    def name(self, path: Path) -> str:
        """Relative to the folder."""
        return path.relative_to(self.folder).as_posix().encode(errors="replace").decode()

    def names(self, paths: Iterable[Path]) -> list[str]:
        return [self.name(path) for path in paths]


def scan_folder(folder: Path, *, deep: bool = True) -> PictureFolder:
    """The pictures in a folder by name, each with the NAME.txt beside it. deep: also in the folders below it."""
    files = _files(folder, deep=deep)
    badly_named = {path for path in files if not _has_utf8_name(path, folder)}
    reasons = {path: why_unused(path) for path in files}
    reasons |= {path: NOT_UTF8_NAME for path in badly_named if reasons[path] is None}
    unused = [Unused(path, reason) for path, reason in reasons.items() if reason]
    by_stem: dict[Path, list[Path]] = {}  # the pictures of NAME, without its ending
    for path in files:
        if reasons[path] is None:
            by_stem.setdefault(path.with_suffix(""), []).append(path)
    texts, unread = _caption_files(files, badly_named)
    unread += [
        Unused(path, f"of an ending that is not read; rename it to NAME{CAPTION}")
        for path in files
        if path.suffix.lower() in LIKE_A_CAPTION and path.with_suffix("") in by_stem
    ]
    unread += _other_metadata(folder, files) if deep else []
    without_picture = texts.keys() - by_stem.keys() - {each.path.with_suffix("") for each in unused}
    return PictureFolder(
        folder,
        tuple(path for path in files if reasons[path] is None),
        {path: texts[stem] for stem, paths in by_stem.items() if stem in texts for path in paths},
        tuple(unused),
        tuple(unread),
        tuple(path for stem, path in texts.items() if stem in without_picture),
        tuple(tuple(paths) for stem, paths in by_stem.items() if stem in texts and len(paths) > 1),
    )


def _caption_files(files: Sequence[Path], badly_named: set[Path]) -> tuple[dict[Path, Path], list[Unused]]:
    """(the caption file of each NAME without its ending, caption files that are not read)."""
    texts = [path for path in files if path.suffix.lower() == CAPTION]
    unreadable = {path: NOT_UTF8_NAME if path in badly_named else _not_a_file(path) for path in texts}
    unread = [Unused(path, reason) for path, reason in unreadable.items() if reason]
    by_stem: dict[Path, Path] = {}
    for path in texts:
        if unreadable[path]:
            continue
        other = by_stem.setdefault(path.with_suffix(""), path)
        if other != path:  # NAME.txt and NAME.TXT: other programs read .txt
            used, left = (path, other) if path.suffix == CAPTION else (other, path)
            by_stem[path.with_suffix("")] = used
            unread.append(Unused(left, f"{used.name} is read instead"))
    return by_stem, unread


def scan_siblings(metadata: Path, named: Iterable[Path]) -> PictureFolder:
    """The same for a folder whose metadata file has the captions. named: the pictures that it names."""
    found, pictures = scan_folder(metadata.parent), tuple(named)
    normalized = {Path(os.path.normpath(path)) for path in pictures}
    others = [Unused(path, f"{metadata.name} does not name it") for path in found.pictures if path not in normalized]
    stems = {path.with_suffix("") for path in normalized}
    texts = [path for path in (*found.captions.values(), *found.orphan_captions) if path.with_suffix("") in stems]
    unread = [Unused(path, f"captions come from {metadata.name}") for path in dict.fromkeys(texts)]
    unread += [each for each in found.unread if each.path.name.lower() in LIKE_METADATA]
    unused = [each for each in found.unused if each.path not in normalized]
    return PictureFolder(found.folder, pictures, {}, (*others, *unused), tuple(unread))


def metadata_of(folder: Path) -> Path | None:
    """The file that names the pictures of an imagefolder and has their captions; None where there is none."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _other_metadata(folder: Path, files: Iterable[Path]) -> list[Unused]:
    """Files that look like metadata and are not read."""
    used = metadata_of(folder)
    only = f"only {', '.join(METADATA)} are read, in the folder that the spec names"
    return [
        Unused(path, f"{used.name} is read instead" if used and path in [folder / name for name in METADATA] else only)
        for path in files
        if path.name.lower() in LIKE_METADATA and path != used
    ]


def _files(folder: Path, *, deep: bool) -> list[Path]:
    """All but folders, by name. Hidden files and folders (`._a.png`, `.ipynb_checkpoints`) are skipped."""
    paths = sorted(folder.rglob("*") if deep else folder.iterdir())
    return [
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (path.is_symlink() or not path.is_dir())
    ]


def _has_utf8_name(path: Path, folder: Path) -> bool:
    """A name that is not UTF-8 cannot be written into keys, logs and pages."""
    try:
        path.relative_to(folder).as_posix().encode()
    except UnicodeEncodeError:
        return False
    return True


def why_unused(path: Path) -> str | None:
    """Why a file is not read as a picture; None where it is, "" where it does not look like one."""
    if path.is_dir():  # a link to a folder: `_files` gives no others
        has_pictures = any(inside.suffix.lower() in FORMAT_BY_ENDING for inside in path.iterdir())
        return "a link to a folder, which is not searched; put the pictures themselves there" if has_pictures else ""
    reason = unreadable_ending(path.suffix.lower())
    return reason if reason == "" else _not_a_file(path) or reason


def _not_a_file(path: Path) -> str | None:
    if path.is_file():
        return None
    return "a link to a file that is not there" if path.is_symlink() and not path.exists() else "not a regular file"
