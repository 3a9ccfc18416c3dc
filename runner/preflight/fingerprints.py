"""Fingerprints of images, by which a check finds unreadable, duplicate and animated ones. Each image is decoded
once."""

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
from runner.data.image_formats import is_animated
from runner.data.images import Picture

if TYPE_CHECKING:
    import numpy as np

# Two images are near-duplicates if both hold. Hashes alone say too little of flat images.
MAX_HASH_DISTANCE = 4  # bits of 64
MAX_THUMB_DIFFERENCE = 40  # levels of 255, of any value of the thumbnails
THUMB_SIDE = 16


@dataclass(frozen=True)
class ImageFingerprint:
    """size: (width, height), upright. pixels: digest of all pixels. hash: difference hash, 64 bits of "darker than its
    right neighbour" in a 9x8 grey image. thumb: int16 (THUMB_SIDE, THUMB_SIDE, 3). animated: it has more than one
    frame."""

    size: tuple[int, int]
    pixels: str
    hash: int
    thumb: np.ndarray[Any, Any]
    animated: bool = False


def fingerprint_image(picture: Picture) -> ImageFingerprint | str:
    """The fingerprint, after decoding the whole image as training would; or a message why it cannot be read."""
    try:
        with images.one_large_at_a_time(picture):
            return _fingerprint(picture)
    except FluxrunError as error:
        return str(error)


def _fingerprint(picture: Picture) -> ImageFingerprint:
    import numpy as np
    from PIL import Image

    upright = images.decode(picture)
    with picture.open() as opened:
        animated = is_animated(opened)
    grey = np.asarray(upright.convert("L").resize((9, 8), Image.Resampling.BOX))
    bits = np.packbits((grey[:, :-1] < grey[:, 1:]).ravel())
    thumb = np.asarray(upright.resize((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BOX)).astype(np.int16)
    digest = hashlib.sha256(repr(upright.size).encode())
    for top in range(0, upright.height, 256):  # in strips, so that a large image's bytes are in memory only once
        digest.update(upright.crop((0, top, upright.width, min(top + 256, upright.height))).tobytes())
    return ImageFingerprint(upright.size, digest.hexdigest(), int.from_bytes(bits.tobytes(), "big"), thumb, animated)


def fingerprint_images(pictures: Iterable[Picture]) -> dict[str, ImageFingerprint | str]:
    """Fingerprints, or messages, by `Picture.location`. Files are decoded in threads, rows of a data set one after the
    other."""
    by_location = {picture.location: picture for picture in pictures}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="fingerprint") as pool:
        files = {
            location: pool.submit(fingerprint_image, picture)
            for location, picture in by_location.items()
            if Path(location).is_file()
        }
        rows = {
            location: fingerprint_image(picture) for location, picture in by_location.items() if location not in files
        }
        return {location: rows[location] if location in rows else files[location].result() for location in by_location}


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that show the same, by their index. exact_copies: `members`, grouped by equal pixels."""

    members: tuple[int, ...]
    exact_copies: tuple[tuple[int, ...], ...]


def find_duplicates(fingerprints: Sequence[ImageFingerprint]) -> list[DuplicateGroup]:
    """Every group of two or more. An image that is a near-duplicate of one member belongs to the group."""
    import numpy as np

    copies: dict[str, list[int]] = {}
    for index, fingerprint in enumerate(fingerprints):
        copies.setdefault(fingerprint.pixels, []).append(index)
    distinct = [indices[0] for indices in copies.values()]
    hashes = np.array([fingerprints[index].hash for index in distinct], np.uint64)
    parent = list(range(len(distinct)))  # union-find over `distinct`

    def root(item: int) -> int:
        while parent[item] != item:
            item = parent[item]
        return item

    for first in range(len(distinct)):
        distances = np.bitwise_count(hashes[first + 1 :] ^ hashes[first])
        for second in first + 1 + np.flatnonzero(distances <= MAX_HASH_DISTANCE):
            thumb, other = fingerprints[distinct[first]].thumb, fingerprints[distinct[int(second)]].thumb
            if int(np.abs(thumb - other).max()) <= MAX_THUMB_DIFFERENCE:
                low, high = sorted((root(first), root(int(second))))
                parent[high] = low
    groups: dict[int, list[list[int]]] = {}
    for item, indices in enumerate(copies.values()):
        groups.setdefault(root(item), []).append(indices)
    duplicates = [
        DuplicateGroup(tuple(sorted(index for indices in group for index in indices)), tuple(map(tuple, group)))
        for group in groups.values()
    ]
    return [group for group in duplicates if len(group.members) > 1]
