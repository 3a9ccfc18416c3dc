"""Laws of buckets and batches, tried on drawn examples (hypothesis; the same ones each time)."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from runner.data import buckets
from runner.plan.build import make_plan
from tests.support.laws import examples, loaded
from tests.support.spec_examples import FACTS, LEAST, laid_over


@examples(30)
@given(
    st.integers(1, 50), st.integers(0, 20), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)
)
def test_an_epoch_shows_every_view_at_least_once(
    images: int, held: int, batch: int, accumulate: int, repeats: int, epochs: int
) -> None:
    """Of those that are trained on, and not a step more than that takes."""
    from dataclasses import replace

    held = min(held, images - 1)
    tables = laid_over(LEAST, {"data": {"repeats": repeats, "holdout": held}, "train": {"steps": None, "epochs": epochs,
                       "batch_size": batch, "accumulate": accumulate}})  # fmt: skip
    made = make_plan(loaded(tables)[0].spec, replace(FACTS, image_count=images))
    per_step = batch * accumulate
    assert made.steps * per_step >= (images - held) * repeats * epochs
    assert (made.steps / epochs - 1) * per_step < (images - held) * repeats


SIZES = st.tuples(st.integers(64, 4000), st.integers(64, 4000))


@examples(60)
@given(
    st.lists(SIZES, min_size=1, max_size=12),
    st.lists(st.integers(2, 64).map(lambda n: 16 * n), min_size=1, max_size=3, unique=True),
)
def test_every_picture_is_in_the_bucket_of_its_shape(sizes: list[tuple[int, int]], sides: list[int]) -> None:
    """Once per resolution; sides are multiples of 16 and the area about that of the square; a picture twice as large is
    in the same bucket."""
    found = buckets.group_by_bucket(sizes, tuple(sides), buckets=True)
    assert Counter(index for chosen in found.values() for index in chosen) == dict.fromkeys(
        range(len(sizes)), len(sides)
    )
    assert list(found) == sorted(found)
    for side in sides:
        ladder = buckets.bucket_sizes(side)
        assert ladder[0] == (side, side)
        assert len(set(ladder)) == len(ladder)
        for wide, high in ladder:
            assert wide % 16 == high % 16 == 0
            assert abs(wide * high - side * side) <= 16 * (wide + high) / 2 + 64
        for width, height in sizes:
            chosen = buckets.nearest_bucket((width, height), ladder)
            measures = [abs(height * wide - width * high) for wide, high in ladder]
            assert abs(height * chosen[0] - width * chosen[1]) == min(measures)
            assert buckets.nearest_bucket((2 * width, 2 * height), ladder) == chosen
    squares = buckets.group_by_bucket(sizes, tuple(sides), buckets=False)
    assert squares == {(side, side): tuple(range(len(sizes))) for side in sorted(sides)}


@examples(25)
@given(
    st.dictionaries(st.sampled_from([(64, 64), (48, 80), (80, 48)]), st.integers(1, 7), min_size=1, max_size=3),
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 5),
)  # fmt: skip
def test_a_cycle_of_batches_shows_every_view_equally_often(
    counts: dict[tuple[int, int], int], images: int, accumulate: int, seed: int
) -> None:
    """And tells each time how often it was shown before."""
    cycle = sum(counts.values())
    seen: Counter[tuple[tuple[int, int], int]] = Counter()
    for number in range(cycle * accumulate):
        step, micro = divmod(number, accumulate)
        size, shown = buckets.draw_batch(seed, step, micro, images=images, accumulate=accumulate, counts=counts)
        assert len(shown) == images
        for index, epoch in shown:
            assert epoch == seen[size, index]
            seen[size, index] += 1
    assert set(seen) == {(size, index) for size, count in counts.items() for index in range(count)}
    assert set(seen.values()) == {images * accumulate}
