"""Pictures and their captions: one value each, so they cannot part; decoding and cropping."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

from runner.core.errors import FluxrunError
from runner.core.seeds import derive
from runner.data.image_files import PictureFolder, TooManyPixelsError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


LARGE = 1 << 25  # pixels
ONE_LARGE = Lock()


@dataclass(frozen=True)
class Picture:
    """One training image. `name` is its name inside the data set, `location` names it to a user; `open` gives it
    undecoded. `digest`: SHA-256 of its file, "" where it has none of its own."""

    name: str
    location: str
    caption: str
    open: Callable[[], Image]
    digest: str = ""


@dataclass(frozen=True)
class Pictures:
    """`held_out`: kept from training, for the eval loss; `folder`: the other files of the folder they come from, if
    any."""

    items: tuple[Picture, ...]
    fingerprint: str
    held_out: tuple[Picture, ...] = ()
    folder: PictureFolder | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """Distinct captions of the training pictures, in order of first use."""
        return tuple(dict.fromkeys(picture.caption for picture in self.items))

    def hold_out(self, count: int) -> Pictures:
        """Keep `count` pictures from training, chosen by name: the same ones for every seed, so that runs compare."""
        chosen = set(
            sorted((picture.name for picture in self.items), key=lambda name: derive(0, "holdout", name))[:count]
        )
        items = tuple(picture for picture in self.items if picture.name not in chosen)
        held_out = tuple(picture for picture in self.items if picture.name in chosen)
        return replace(self, items=items, held_out=held_out)


class DataError(Exception):
    """What is wrong with a data set: a message each, or (key of the spec, message); the caller knows the spec's
    lines."""

    def __init__(self, *faults: str | tuple[str, str]) -> None:
        self.faults = tuple(("data.source", fault) if isinstance(fault, str) else fault for fault in faults)
        super().__init__("; ".join(message for _, message in self.faults))


def decode(picture: Picture) -> Image:
    """Upright, in RGB, transparency on white, 16 bits reduced to 8. Raises FluxrunError where it cannot be read."""
    from PIL import ImageOps

    try:
        with picture.open() as opened:
            return _in_rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(picture, error) from error


@contextmanager
def in_turn(picture: Picture) -> Iterator[None]:
    """Large pictures are decoded and looked at one at a time, for their memory: one of 2**28 pixels takes 2 GB."""
    pixels = 0
    with suppress(OSError, SyntaxError, ValueError), picture.open() as opened:  # told by who decodes it
        pixels = opened.width * opened.height
    with ONE_LARGE if pixels > LARGE else nullcontext():
        yield


def _in_rgb(upright: Image) -> Image:
    from PIL import Image

    if upright.mode.startswith("I"):  # 16 bits; convert() would clip them to white
        import numpy as np

        upright = Image.fromarray((np.asarray(upright).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return upright.convert("RGB")


def measure(picture: Picture) -> tuple[int, int]:
    """Upright (width, height), from the header alone. Raises FluxrunError."""
    from PIL import ExifTags

    try:
        with picture.open() as opened:
            width, height = opened.size
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(picture, error) from error
    return (height, width) if turned else (width, height)


def _unreadable(picture: Picture, error: Exception) -> FluxrunError:
    way_out = "scale it down" if isinstance(error, TooManyPixelsError) else "repair it, or remove it from the data"
    return FluxrunError(f"{picture.location}: not a readable image ({error}); {way_out}")


def pixels(
    upright: Image, name: str, size: tuple[int, int], *,
    variant: int | None, variants: int, center: bool, flip: bool, interpolation: str, seed: int,
) -> np.ndarray[Any, Any]:  # fmt: skip
    """[height, width, 3] uint8: resized to cover `size` (width, height), cropped, perhaps mirrored.

    `variant` None is the middle as it is. Otherwise the crop is drawn from the seed, the name and the variant; with
    `flip` every other variant is mirrored, beginning with a seeded one.
    """
    import numpy as np
    from PIL import Image, ImageOps

    wide, high = size
    scale = max(wide / upright.width, high / upright.height)
    width, height = max(wide, round(upright.width * scale)), max(high, round(upright.height * scale))
    resized = upright.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = (width - wide) // 2, (height - high) // 2
    if variant is not None and not center:
        draw = random.Random(derive(seed, "crop", name, variant))
        left, top = draw.randint(0, width - wide), draw.randint(0, height - high)
    cropped = resized.crop((left, top, left + wide, top + high))
    if variant is not None and flip and (derive(seed, "flip", name) + variant) % 2:
        cropped = ImageOps.mirror(cropped)
    return np.asarray(cropped)
