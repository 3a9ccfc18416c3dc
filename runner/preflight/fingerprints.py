"""Pictures as a check sees them: decoded once, in threads, and what tells one from another. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.core.errors import FluxrunError
from runner.data import images
from runner.data.image_files import is_animated
from runner.data.images import Picture

if TYPE_CHECKING:
    import numpy as np


HASH_APART = 4  # bits of 64 by which the hashes of two copies of a picture differ at most
THUMB_APART = 40  # levels of 255 that no cell of their thumbnails exceeds: hashes of flat pictures alone say too little
THUMB = 16


@dataclass(frozen=True)
class ImageFingerprint:
    """size: upright (width, height); pixels: a digest; hash: 64 bits of "darker than its right neighbour"; animated: it has
    more frames than the first, which is read."""

    size: tuple[int, int]
    pixels: str
    hash: int
    thumb: np.ndarray[Any, Any]
    animated: bool = False


def fingerprint_images(picture: Picture) -> ImageFingerprint | str:
    """Or why it cannot be read, after decoding it whole as training would."""
    try:
        with images.in_turn(picture):
            return _look(picture)
    except FluxrunError as error:
        return str(error)


def _look(picture: Picture) -> ImageFingerprint:
    import numpy as np
    from PIL import Image

    upright = images.decode(picture)
    with picture.open() as opened:
        animated = is_animated(opened)
    grey = np.asarray(upright.convert("L").resize((9, 8), Image.Resampling.BOX))
    bits = np.packbits((grey[:, :-1] < grey[:, 1:]).ravel())
    thumb = np.asarray(upright.resize((THUMB, THUMB), Image.Resampling.BOX)).astype(np.int16)
    digest = hashlib.sha256(repr(upright.size).encode())
    for top in range(0, upright.height, 256):  # in strips: a large picture's bytes are not wanted twice
        digest.update(upright.crop((0, top, upright.width, min(top + 256, upright.height))).tobytes())
    return ImageFingerprint(upright.size, digest.hexdigest(), int.from_bytes(bits.tobytes(), "big"), thumb, animated)


def fingerprint_image(pictures: Iterable[Picture]) -> dict[str, ImageFingerprint | str]:
    """By `Picture.where`. Files are decoded in threads, rows of a data set in turn."""
    each = {picture.where: picture for picture in pictures}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="look") as pool:
        files = {where: pool.submit(fingerprint_images, one) for where, one in each.items() if Path(where).is_file()}
        rows = {where: fingerprint_images(one) for where, one in each.items() if where not in files}
        return {where: rows[where] if where in rows else files[where].result() for where in each}


@dataclass(frozen=True)
class Duplicate:
    """Pictures that show the same, by their index. `copies`: those among them that are the same to the pixel."""

    members: tuple[int, ...]
    copies: tuple[tuple[int, ...], ...]


def duplicates(looks: Sequence[ImageFingerprint]) -> list[Duplicate]:
    """Every group of two or more. What looks like one of a group belongs to it."""
    import numpy as np

    same: dict[str, list[int]] = {}
    for index, one in enumerate(looks):
        same.setdefault(one.pixels, []).append(index)
    firsts = [members[0] for members in same.values()]
    hashes = np.array([looks[index].hash for index in firsts], np.uint64)
    group = list(range(len(firsts)))  # of each different picture: the first one of its group

    def root(at: int) -> int:
        while group[at] != at:
            at = group[at]
        return at

    for first in range(len(firsts)):
        apart = np.bitwise_count(hashes[first + 1 :] ^ hashes[first])
        for second in first + 1 + np.flatnonzero(apart <= HASH_APART):
            one, other = looks[firsts[first]], looks[firsts[int(second)]]
            if int(np.abs(one.thumb - other.thumb).max()) <= THUMB_APART:
                low, high = sorted((root(first), root(int(second))))
                group[high] = low
    found: dict[int, list[list[int]]] = {}
    for at, members in enumerate(same.values()):
        found.setdefault(root(at), []).append(members)
    groups = [
        Duplicate(tuple(sorted(index for kind in kinds for index in kind)), tuple(map(tuple, kinds)))
        for kinds in found.values()
    ]
    return [one for one in groups if len(one.members) > 1]
