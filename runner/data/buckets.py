"""Which part of which picture training sees, and when: sizes, aspect-ratio buckets, batches.

Sizes are (width, height) in pixels. A view is a picture at a size, cropped in one way. Only views of one size share a
batch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from runner.core.seeds import derive
from runner.data.images import Picture

Size = tuple[int, int]
SIZE_MULTIPLE = 16  # pixels, FLUX's granularity: 8 to a latent, 2 x 2 latents to a token

# Width to height, as in diffusers' `generate_aspect_ratio_buckets`, whose import would load torch.
RATIOS = ((1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1))


@dataclass(frozen=True)
class CropView:
    """variant: number of a random crop and flip of the picture; None for its center, not flipped."""

    picture: Picture
    size: Size
    variant: int | None


def bucket_sizes(side: int) -> tuple[Size, ...]:
    """Different sizes of about side x side pixels in area, one for each aspect ratio."""

    def rounded(length: float) -> int:
        return max(SIZE_MULTIPLE, round(length / SIZE_MULTIPLE) * SIZE_MULTIPLE)

    sizes = []
    for wide, high in RATIOS:
        height = (side * side * high / wide) ** 0.5
        sizes.append((rounded(height * wide / high), rounded(height)))
    return tuple(dict.fromkeys(sizes))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of the most similar shape, by diffusers' measure (`find_nearest_bucket`): |h * bucket_w - w *
    bucket_h|."""
    width, height = size
    return min(reversed(buckets), key=lambda bucket: abs(height * bucket[0] - width * bucket[1]))


def group_by_bucket(sizes: Sequence[Size], resolutions: Sequence[int], buckets: bool) -> dict[Size, tuple[int, ...]]:
    """The size at which each picture is trained -> the positions of the pictures. Every picture is in it once for each
    resolution. sizes: of the pictures; buckets: False for squares alone."""
    groups: dict[Size, list[int]] = {}
    for side in resolutions:
        candidates = bucket_sizes(side) if buckets else ((side, side),)
        for index, size in enumerate(sizes):
            groups.setdefault(nearest_bucket(size, candidates), []).append(index)
    return {size: tuple(groups[size]) for size in sorted(groups)}


@lru_cache(maxsize=64)
def _shuffled(seed: int, what: str, epoch: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers i, counts[i] times each, in a seeded order."""
    order = [i for i, count in enumerate(counts) for _ in range(count)]
    random.Random(derive(seed, what, epoch)).shuffle(order)
    return tuple(order)


def draw_batch(
    seed: int, step: int, micro: int, *, images: int, accumulate: int, counts: Mapping[Size, int], what: str = "order"
) -> tuple[Size, list[tuple[int, int]]]:
    """(size, [(position in that size's group, how often it was shown before)]) for one micro-batch of `images` views.

    Sizes alternate in a seeded order; in each cycle a size is drawn once for each of its views. The views of one size
    are shown in shuffled epochs, one after the other. So a batch has one size, nothing is dropped, and every view is
    shown equally often. counts: the number of views of each size; what: name of the random stream: training images and
    class images have their own.
    """
    sizes, shares = tuple(counts), tuple(counts.values())
    cycle, place = divmod(step * accumulate + micro, sum(shares))
    turns = _shuffled(seed, f"{what}/sizes", cycle, shares)
    chosen = turns[place]
    before = cycle * shares[chosen] + turns[:place].count(chosen)
    count = shares[chosen]
    batch = []
    for k in range(before * images, (before + 1) * images):
        epoch, at = divmod(k, count)
        batch.append((_shuffled(seed, f"{what}/{chosen}", epoch, (1,) * count)[at], epoch))
    return sizes[chosen], batch


def variant(seed: int, name: str, shown: int, variants: int) -> int:
    """The variant of a picture that was shown `shown` times before: all in turn, beginning with a seeded one."""
    return (derive(seed, "variant", name) + shown) % variants
