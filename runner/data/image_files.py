"""Sorts the files of a folder into pictures, captions and unused files, with the reason for each unused one."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


# Endings that are read. Whatever a file is called, only these decoders see it: Pillow's EPS starts Ghostscript.
FORMAT_BY_ENDING = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP", ".bmp": "BMP",
    ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF", ".avif": "AVIF",
}  # fmt: skip
FORMATS = tuple(dict.fromkeys(FORMAT_BY_ENDING.values()))
HEIC = (".heic", ".heif", ".hif")

CAMERA_RAW = ".3fr .arw .cr2 .cr3 .crw .dng .erf .iiq .kdc .mrw .nef .nrw .orf .pef .raf .raw .rw2 .sr2 .srf .srw .x3f"
OF_A_PROGRAM = ".af .afphoto .ai .clip .kra .procreate .psb .psd .svg .svgz .xcf"
OTHER_PICTURES = ".dds .dib .eps .exr .hdr .icns .ico .j2k .jp2 .jpx .jxl .jxr .pbm .pcx .pgm .pnm .ppm .qoi .tga"
NOT_READ = {
    **dict.fromkeys(CAMERA_RAW.split(), "a camera's raw file; save it as PNG or JPEG"),
    **dict.fromkeys(OF_A_PROGRAM.split(), "a drawing program's own file; save it as PNG"),
    **dict.fromkeys(OTHER_PICTURES.split(), "of a format that is not read; save it as PNG or JPEG"),
}
CAPTION = ".txt"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first that is there, in the folder itself
LIKE_METADATA = {
    f"{stem}{ending}"
    for stem in ("metadata", "captions")
    for ending in (".jsonl", ".csv", ".parquet", ".json", ".tsv", ".xlsx")
}
LIKE_A_CAPTION = {
    *(".cap", ".caption", ".captions", ".doc", ".docx", ".json", ".md", ".prompt"),
    *(".rtf", ".tag", ".tags", ".text", ".xml", ".yaml", ".yml"),
}
# https://github.com/strukturag/libheif/blob/master/libheif/api/libheif/heif_brands.h, those with HEVC inside
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")

MOST_PIXELS = 1 << 28  # 16,384 x 16,384: the AVIF decoder's own limit; 0.8 GB of memory in RGB


class TooManyPixelsError(ValueError):
    """A picture that would take too much memory, by what its header says."""

    def __init__(self, pixels: int) -> None:
        super().__init__(f"expected at most {MOST_PIXELS:,} pixels (16,384 x 16,384), got {pixels:,}")


@dataclass(frozen=True)
class Unused:
    path: Path
    why: str


@dataclass(frozen=True)
class PictureFolder:
    """`captions`: the file that a picture's is read from, for those that have one; `unused`: what looks like a picture
    and is none of `pictures`; `unread`: what looks like a caption and is not read; `orphan_captions`: captions without
    a picture; `shared_captions`: pictures that have one caption file between them."""

    folder: Path
    pictures: tuple[Path, ...]
    captions: Mapping[Path, Path] = field(default_factory=dict)
    unused: tuple[Unused, ...] = ()
    unread: tuple[Unused, ...] = ()
    orphan_captions: tuple[Path, ...] = ()
    shared_captions: tuple[tuple[Path, ...], ...] = ()

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix().encode(errors="replace").decode()

    def names(self, paths: Iterable[Path]) -> list[str]:
        return [self.name(path) for path in paths]


def scan_folder(folder: Path, *, deep: bool = True) -> PictureFolder:
    """The pictures in a folder (deep: and in those below it) by name, each with the NAME.txt beside it."""
    files = _files(folder, deep=deep)
    odd = {path for path in files if not _has_text_name(path, folder)}
    looked_at = {path: why_unused(path) for path in files}
    looked_at |= {path: NO_TEXT_NAME for path in odd if looked_at[path] is None}
    pictures = [path for path, why in looked_at.items() if why is None]
    unused = [Unused(path, why) for path, why in looked_at.items() if why]
    texts = [path for path in files if path.suffix.lower() == CAPTION]
    unread = [Unused(path, why) for path in texts if (why := NO_TEXT_NAME if path in odd else _not_a_file(path))]
    by_stem: dict[Path, Path] = {}
    for path in texts:
        if path in odd or _not_a_file(path):
            continue
        other = by_stem.setdefault(path.with_suffix(""), path)
        if other != path:  # NAME.TXT comes first by name, and .txt is what other programs read
            read, left = (path, other) if path.suffix == CAPTION else (other, path)
            by_stem[path.with_suffix("")] = read
            unread.append(Unused(left, f"{read.name} is read instead"))
    stems: dict[Path, list[Path]] = {}
    for path in pictures:
        stems.setdefault(path.with_suffix(""), []).append(path)
    passed_over = {one.path.with_suffix("") for one in unused}
    unread += [
        Unused(path, f"of an ending that is not read; rename it to NAME{CAPTION}")
        for path in files
        if path.suffix.lower() in LIKE_A_CAPTION and path.with_suffix("") in stems
    ]
    unread += _other_metadata(folder, files) if deep else []
    return PictureFolder(
        folder,
        tuple(pictures),
        {path: by_stem[stem] for stem, paths in stems.items() if stem in by_stem for path in paths},
        tuple(unused),
        tuple(unread),
        tuple(path for stem, path in by_stem.items() if stem not in stems and stem not in passed_over),
        tuple(tuple(paths) for stem, paths in stems.items() if stem in by_stem and len(paths) > 1),
    )


def scan_siblings(metadata: Path, named: Iterable[Path]) -> PictureFolder:
    """The same of a folder whose metadata file names the pictures and holds the captions."""
    found, pictures = scan_folder(metadata.parent), tuple(named)
    named_paths = {Path(os.path.normpath(path)) for path in pictures}
    others = [Unused(path, f"{metadata.name} does not name it") for path in found.pictures if path not in named_paths]
    stems = {path.with_suffix("") for path in named_paths}
    texts = [path for path in (*found.captions.values(), *found.orphan_captions) if path.with_suffix("") in stems]
    unread = [Unused(path, f"captions come from {metadata.name}") for path in dict.fromkeys(texts)]
    unread += [one for one in found.unread if one.path.name.lower() in LIKE_METADATA]
    unused = [one for one in found.unused if one.path not in named_paths]
    return PictureFolder(found.folder, pictures, {}, (*others, *unused), tuple(unread))


def metadata_of(folder: Path) -> Path | None:
    """The file that names the pictures of an imagefolder and holds their captions."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _other_metadata(folder: Path, files: Iterable[Path]) -> list[Unused]:
    used = metadata_of(folder)
    only = f"only {', '.join(METADATA)} are read, in the folder that the spec names"
    return [
        Unused(path, f"{used.name} is read instead" if used and path in [folder / name for name in METADATA] else only)
        for path in files
        if path.name.lower() in LIKE_METADATA and path != used
    ]


def _files(folder: Path, *, deep: bool) -> list[Path]:
    """Everything but folders, by name; what is hidden (`._a.png`, `.ipynb_checkpoints`) is nobody's picture."""
    found = sorted(folder.rglob("*") if deep else folder.iterdir())
    return [
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (path.is_symlink() or not path.is_dir())
    ]


NO_TEXT_NAME = "its name is not UTF-8; rename it"


def _has_text_name(path: Path, folder: Path) -> bool:
    """Names are bytes to a disk; those that are no text cannot stand in a spec's key, a log or a page."""
    try:
        path.relative_to(folder).as_posix().encode()
    except UnicodeEncodeError:
        return False
    return True


def why_unused(path: Path) -> str | None:
    """Why a file is not read as a picture; None where it is, "" where it does not look like one."""
    ending = path.suffix.lower()
    if path.is_dir():  # a link: folders themselves are not asked about
        holds = any(one.suffix.lower() in FORMAT_BY_ENDING for one in path.iterdir())
        return "a link to a folder, which is not looked into; put the pictures themselves there" if holds else ""
    why = unreadable_ending(ending)
    if why is None or why:
        return _not_a_file(path) or why
    return ""


def unreadable_ending(ending: str) -> str | None:
    """Why pictures of an ending (".heic") are not read; None where they are, "" where pictures have no such ending."""
    if ending in HEIC:
        return None if find_spec("pillow_heif") else 'HEIC, which needs pillow-heif; pip install "fluxrun[heic]"'
    if ending == ".avif":
        from PIL import features

        return None if features.check("avif") else "AVIF, which this Pillow was built without; save it as PNG or JPEG"
    return None if ending in FORMAT_BY_ENDING else NOT_READ.get(ending, "")


def _not_a_file(path: Path) -> str | None:
    if path.is_file():
        return None
    return "a link to a file that is not there" if path.is_symlink() and not path.exists() else "not a regular file"


def open_picture(source: Path | io.BytesIO, ending: str) -> Image:
    """A picture undecoded, read by the decoders of FORMAT_BY_ENDING only. Pillow's warnings are dropped: no user can
    act on them.

    Raises TooManyPixelsError, and what Pillow raises.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # where it would warn; it refuses twice as many while it opens
    formats = FORMATS
    if ending.lower() in HEIC or _is_heic(source):
        if why := unreadable_ending(HEIC[0]):
            raise OSError(why)
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats = (*FORMATS, "HEIF")
    try:
        opened = Image.open(source, formats=formats)
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise TooManyPixelsError(int(found[0]) if found else 2 * MOST_PIXELS) from error
    pixels = opened.width * opened.height
    if pixels > MOST_PIXELS:
        opened.close()
        raise TooManyPixelsError(pixels)
    return opened


def _is_heic(source: Path | io.BytesIO) -> bool:
    """Whatever it is called: phones' pictures often are JPEG by their name alone."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            head = file.read(12)
    else:
        head = source.getvalue()[:12]
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS


def is_animated(opened: Image) -> bool:
    """Whether there is more than the frame that is read. A photograph may hold other versions of itself (MPO), a scan
    further pages; neither is meant."""
    return opened.format in ("GIF", "WEBP", "PNG", "AVIF") and bool(getattr(opened, "is_animated", False))
