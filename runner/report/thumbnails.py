"""Small copies of sample pictures for the results page, kept from one page to the next."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection
from pathlib import Path

from runner.core import files

SIDE = 160  # pixels
QUALITY = 74  # WebP: about 4 kB a picture


class Thumbnails:
    """The thumbnails of a runs folder, in RUNS/.thumbs. `used`: names of the files that `read` asked for."""

    def __init__(self, runs: Path) -> None:
        self.folder = runs / ".thumbs"
        self.used: set[str] = set()

    def read(self, picture: Path) -> bytes | None:
        """A WebP of at most SIDE x SIDE pixels, made if there is none yet; None if the file is no picture."""
        from PIL import Image, UnidentifiedImageError

        try:
            stat = picture.stat()
            key = f"{picture.relative_to(self.folder.parent)} {stat.st_mtime_ns} {stat.st_size} {SIDE} {QUALITY}"
            path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.webp"
            self.used.add(path.name)
            if path.is_file():
                return path.read_bytes()
            with Image.open(picture) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
            return None
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=QUALITY)
        files.make_folder(self.folder)
        files.write_bytes(path, [buffer.getvalue()], durable=False)
        return buffer.getvalue()

    def remove_unused(self) -> None:
        """Remove thumbnails that `read` was not asked for: their pictures have changed or are gone."""
        for path in self.folder.glob("*.webp"):
            if path.name not in self.used:
                path.unlink(missing_ok=True)


def spread_evenly(steps: Collection[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread. The last one is always among them; the first one if `count` is above
    1."""
    ordered = sorted(steps)
    if len(ordered) <= count:
        return ordered
    if count == 1:
        return ordered[-1:]
    return [ordered[round(index * (len(ordered) - 1) / (count - 1))] for index in range(count)]
