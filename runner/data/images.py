"""Pictures with their captions; decoding and cropping them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

from runner.core.errors import FluxrunError
from runner.core.seeds import derive
from runner.data.image_files import PictureFolder
from runner.data.image_formats import TooManyPixelsError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


LARGE = 1 << 25  # pixels
_LARGE_LOCK = Lock()


@dataclass(frozen=True)
class Picture:
    """One training image.

    name: inside the data set; location: as messages name it; open: gives the image undecoded; digest: SHA-256 of its
    file, "" if it has no file of its own.
    """

    name: str
    location: str
    caption: str
    open: Callable[[], Image]
    digest: str = ""


@dataclass(frozen=True)
class Pictures:
    """A data set. held_out: not trained on, for the eval loss; folder: what else is in the folder, if they come from
    one."""

    items: tuple[Picture, ...]
    fingerprint: str
    held_out: tuple[Picture, ...] = ()
    folder: PictureFolder | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """Distinct captions of the training images, in order of first use."""
        return tuple(dict.fromkeys(picture.caption for picture in self.items))

    def hold_out(self, count: int) -> Pictures:
        """With `count` images held out, chosen by their names: the same for every seed, so that runs compare."""
        shuffled = sorted((picture.name for picture in self.items), key=lambda name: derive(0, "holdout", name))
        chosen = set(shuffled[:count])
        items = tuple(picture for picture in self.items if picture.name not in chosen)
        held_out = tuple(picture for picture in self.items if picture.name in chosen)
        return replace(self, items=items, held_out=held_out)


class DataError(Exception):
    """What is wrong with a data set: messages, or (key of the spec, message). The caller knows the lines of the
    spec."""

    def __init__(self, *faults: str | tuple[str, str]) -> None:
        self.faults = tuple(("data.source", fault) if isinstance(fault, str) else fault for fault in faults)
        super().__init__("; ".join(message for _, message in self.faults))


def decode(picture: Picture) -> Image:
    """The image upright and in RGB, with white for transparency, and 16 bits reduced to 8. Raises FluxrunError."""
    from PIL import ImageOps

    try:
        with picture.open() as opened:
            return _in_rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(picture, error) from error


@contextmanager
def one_large_at_a_time(picture: Picture) -> Iterator[None]:
    """For decoding in threads: large images take turns, since one of 2**28 pixels takes 2 GB of memory."""
    pixels = 0
    with suppress(OSError, SyntaxError, ValueError), picture.open() as opened:  # reported by `decode`
        pixels = opened.width * opened.height
    with _LARGE_LOCK if pixels > LARGE else nullcontext():
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
    """(width, height) of the upright image, from its header alone. Raises FluxrunError."""
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


def cropped_pixels(
    upright: Image, name: str, size: tuple[int, int], *,
    variant: int | None, variants: int, center: bool, flip: bool, interpolation: str, seed: int,
) -> np.ndarray[Any, Any]:  # fmt: skip
    """[height, width, 3] uint8: resized to cover `size` (width, height), cropped, perhaps flipped.

    variant: None for the center, not flipped. Else the crop is drawn from the seed, the name and the variant, and with
    `flip` every other variant is flipped, beginning with a seeded one.
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
