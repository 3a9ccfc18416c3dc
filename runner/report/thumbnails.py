"""Small copies of sample pictures for the results page, made once each. No torch."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection
from pathlib import Path

from runner.core import files

SIDE = 160  # pixels
QUALITY = 74  # WebP: about 4 kB a picture


class Thumbs:
    """The folder `runs/.thumbs`; `used` are the names asked for."""

    def __init__(self, runs: Path) -> None:
        self.folder = runs / ".thumbs"
        self.used: set[str] = set()

    def of(self, picture: Path) -> bytes | None:
        """A WebP of at most SIDE x SIDE pixels; None where the file is no picture."""
        from PIL import Image, UnidentifiedImageError

        try:
            facts = picture.stat()
            key = f"{picture.relative_to(self.folder.parent)} {facts.st_mtime_ns} {facts.st_size} {SIDE} {QUALITY}"
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

    def forget_others(self) -> None:
        """Remove what no picture of now has asked for."""
        for path in self.folder.glob("*.webp"):
            if path.name not in self.used:
                path.unlink(missing_ok=True)


def evenly(steps: Collection[int], count: int) -> list[int]:
    """At most `count` of the steps, spread evenly, the last one always and the first one where two are wanted."""
    ordered = sorted(steps)
    if len(ordered) <= count:
        return ordered
    if count == 1:
        return ordered[-1:]
    return [ordered[round(place * (len(ordered) - 1) / (count - 1))] for place in range(count)]
