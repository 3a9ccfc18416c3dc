"""Pictures as a check sees them: decoded once, in threads, and what tells one from another. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import data
from runner.data import Picture
from runner.errors import FluxrunError

if TYPE_CHECKING:
    import numpy as np

HASH_APART = 4  # bits of 64 by which the hashes of two copies of a picture differ at most
THUMB_APART = 40  # levels of 255 that no cell of their thumbnails exceeds: hashes of flat pictures alone say too little
THUMB = 16


@dataclass(frozen=True)
class Look:
    """size: upright (width, height); pixels: a digest; hash: 64 bits of "darker than its right neighbour"."""

    size: tuple[int, int]
    pixels: str
    hash: int
    thumb: np.ndarray[Any, Any]


def look(picture: Picture) -> Look | str:
    """Or why it cannot be read, after decoding it whole as training would."""
    import numpy as np
    from PIL import Image

    try:
        upright = data.decode(picture)
    except FluxrunError as error:
        return str(error)
    grey = np.asarray(upright.convert("L").resize((9, 8), Image.Resampling.BOX))
    bits = np.packbits((grey[:, :-1] < grey[:, 1:]).ravel())
    thumb = np.asarray(upright.resize((THUMB, THUMB), Image.Resampling.BOX)).astype(np.int16)
    facts = hashlib.sha256(repr(upright.size).encode() + upright.tobytes()).hexdigest()
    return Look(upright.size, facts, int.from_bytes(bits.tobytes(), "big"), thumb)


def look_at(pictures: Iterable[Picture]) -> dict[str, Look | str]:
    """By `Picture.where`. Files are decoded in threads, rows of a data set in turn."""
    each = {picture.where: picture for picture in pictures}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="look") as pool:
        files = {where: pool.submit(look, one) for where, one in each.items() if Path(where).is_file()}
        rows = {where: look(one) for where, one in each.items() if where not in files}
        return {where: rows[where] if where in rows else files[where].result() for where in each}


def copies(looks: Sequence[Look]) -> list[tuple[int, int, bool]]:
    """(first, second, whether to the pixel) of every two that show the same picture."""
    import numpy as np

    hashes = np.array([one.hash for one in looks], np.uint64)
    found = []
    for first in range(len(looks)):
        apart = np.bitwise_count(hashes[first + 1 :] ^ hashes[first])
        for second in first + 1 + np.flatnonzero(apart <= HASH_APART):
            one, other = looks[first], looks[int(second)]
            if int(np.abs(one.thumb - other.thumb).max()) <= THUMB_APART:
                found.append((first, int(second), one.pixels == other.pixels))
    return found
