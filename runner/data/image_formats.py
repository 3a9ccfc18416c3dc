"""Image formats: which endings are read, why the others are not, and opening an image by the decoders allowed."""

from __future__ import annotations

import io
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


# Endings that are read. Only these decoders are used, whatever a file is called: Pillow's EPS would start Ghostscript.
FORMAT_BY_ENDING = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP", ".bmp": "BMP",
    ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF", ".avif": "AVIF",
}  # fmt: skip
FORMATS = tuple(dict.fromkeys(FORMAT_BY_ENDING.values()))
HEIC = (".heic", ".heif", ".hif")

CAMERA_RAW = ".3fr .arw .cr2 .cr3 .crw .dng .erf .iiq .kdc .mrw .nef .nrw .orf .pef .raf .raw .rw2 .sr2 .srf .srw .x3f"
OF_A_PROGRAM = ".af .afphoto .ai .clip .kra .procreate .psb .psd .svg .svgz .xcf"
OTHER_FORMATS = ".dds .dib .eps .exr .hdr .icns .ico .j2k .jp2 .jpx .jxl .jxr .pbm .pcx .pgm .pnm .ppm .qoi .tga"
NOT_READ = {
    **dict.fromkeys(CAMERA_RAW.split(), "a camera's raw file; save it as PNG or JPEG"),
    **dict.fromkeys(OF_A_PROGRAM.split(), "a drawing program's own file; save it as PNG"),
    **dict.fromkeys(OTHER_FORMATS.split(), "of a format that is not read; save it as PNG or JPEG"),
}
# https://github.com/strukturag/libheif/blob/master/libheif/api/libheif/heif_brands.h, those with HEVC inside
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")

MOST_PIXELS = 1 << 28  # 16,384 x 16,384: the AVIF decoder's own limit; 0.8 GB of memory in RGB


class TooManyPixelsError(ValueError):
    """An image that would take too much memory, by its header."""

    def __init__(self, pixels: int) -> None:
        super().__init__(f"expected at most {MOST_PIXELS:,} pixels (16,384 x 16,384), got {pixels:,}")


def unreadable_ending(ending: str) -> str | None:
    """Why images of an ending (".heic") are not read; None where they are, "" for an ending that images do not have."""
    if ending in HEIC:
        return None if find_spec("pillow_heif") else 'HEIC, which needs pillow-heif; pip install "fluxrun[heic]"'
    if ending == ".avif":
        from PIL import features

        return None if features.check("avif") else "AVIF, which this Pillow was built without; save it as PNG or JPEG"
    return None if ending in FORMAT_BY_ENDING else NOT_READ.get(ending, "")


def open_picture(source: Path | io.BytesIO, ending: str) -> Image:
    """An image, undecoded. Pillow's warnings are silenced: a user can do nothing about them.

    Raises TooManyPixelsError, and what Pillow raises.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # Pillow warns from here on, and refuses twice as many when it opens a file
    formats = FORMATS
    if ending.lower() in HEIC or _is_heic(source):
        if reason := unreadable_ending(HEIC[0]):
            raise OSError(reason)
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats = (*FORMATS, "HEIF")
    try:
        opened = Image.open(source, formats=formats)
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        raise TooManyPixelsError(int(count[0]) if count else 2 * MOST_PIXELS) from error
    pixels = opened.width * opened.height
    if pixels > MOST_PIXELS:
        opened.close()
        raise TooManyPixelsError(pixels)
    return opened


def _is_heic(source: Path | io.BytesIO) -> bool:
    """By its content: pictures of phones often are JPEG only by their name."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            head = file.read(12)
    else:
        head = source.getvalue()[:12]
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS


def is_animated(opened: Image) -> bool:
    """Whether there are more frames than the one that is read. Other versions of a photograph in one file (MPO) and
    further pages of a scan do not count."""
    return opened.format in ("GIF", "WEBP", "PNG", "AVIF") and bool(getattr(opened, "is_animated", False))
