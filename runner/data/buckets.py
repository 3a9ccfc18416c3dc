"""Which part of which picture training sees, and when: sizes, buckets, batches. Pure; no torch.

Sizes are (width, height) in pixels. A view is a picture at a size, cropped one way; only views of one size share a
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
SIZE_MULTIPLE = 16  # FLUX's granularity: 8 pixels to a latent, 2 x 2 latents to a token

# Width to height, as in diffusers' `generate_aspect_ratio_buckets` (which costs an import of torch).
RATIOS = ((1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1))


@dataclass(frozen=True)
class CropView:
    """`variant` numbers the seeded crops and mirrorings of a picture; None is its middle, never mirrored."""

    picture: Picture
    size: Size
    variant: int | None


def bucket_sizes(side: int) -> tuple[Size, ...]:
    """Sizes of about side x side pixels, one per aspect ratio, without repetition."""

    def rounded(length: float) -> int:
        return max(SIZE_MULTIPLE, round(length / SIZE_MULTIPLE) * SIZE_MULTIPLE)

    sizes = []
    for wide, high in RATIOS:
        height = (side * side * high / wide) ** 0.5
        sizes.append((rounded(height * wide / high), rounded(height)))
    return tuple(dict.fromkeys(sizes))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape is nearest, by diffusers' measure (`find_nearest_bucket`): |h * bucket_w - w *
    bucket_h|."""
    width, height = size
    return min(reversed(buckets), key=lambda bucket: abs(height * bucket[0] - width * bucket[1]))


def group_by_bucket(sizes: Sequence[Size], resolutions: Sequence[int], buckets: bool) -> dict[Size, tuple[int, ...]]:
    """Which pictures (by index) are trained at which size. Every picture is there once per resolution."""
    found: dict[Size, list[int]] = {}
    for side in resolutions:
        ladder = bucket_sizes(side) if buckets else ((side, side),)
        for index, size in enumerate(sizes):
            found.setdefault(nearest_bucket(size, ladder), []).append(index)
    return {size: tuple(found[size]) for size in sorted(found)}


@lru_cache(maxsize=64)
def _shuffled(seed: int, what: str, epoch: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers i, counts[i] times each, in a seeded order."""
    order = [i for i, count in enumerate(counts) for _ in range(count)]
    random.Random(derive(seed, what, epoch)).shuffle(order)
    return tuple(order)


def draw_batch(
    seed: int, step: int, micro: int, *, images: int, accumulate: int, counts: Mapping[Size, int], what: str = "order"
) -> tuple[Size, list[tuple[int, int]]]:
    """(size, [(index within that size's group, how often it was shown before)]) of one micro-batch of `images`.

    Sizes take turns in a seeded order, each as often per cycle as it has views; each size's own views come in shuffled
    epochs laid end to end. So no batch mixes sizes, nothing is dropped, and every view is shown equally often. `what`
    names the stream: training pictures and class pictures are drawn independently.
    """
    sizes, shares = tuple(counts), tuple(counts.values())
    cycle, place = divmod(step * accumulate + micro, sum(shares))
    turns = _shuffled(seed, f"{what}/sizes", cycle, shares)
    chosen = turns[place]
    before = cycle * shares[chosen] + turns[:place].count(chosen)
    count = shares[chosen]
    shown = []
    for k in range(before * images, (before + 1) * images):
        epoch, at = divmod(k, count)
        shown.append((_shuffled(seed, f"{what}/{chosen}", epoch, (1,) * count)[at], epoch))
    return sizes[chosen], shown


def variant(seed: int, name: str, shown: int, variants: int) -> int:
    """The variant at a picture's `shown`-th showing: all in turn, beginning at a seeded one."""
    return (derive(seed, "variant", name) + shown) % variants
