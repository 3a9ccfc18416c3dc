"""Which pictures training sees when: buckets, groups and batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from runner.data import buckets


@pytest.mark.parametrize("side", [64, 512, 768, 1024])
def test_buckets_are_those_of_diffusers(side: int) -> None:
    from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets

    ours = buckets.bucket_sizes(side)
    theirs = generate_aspect_ratio_buckets(side)
    assert [(height, width) for width, height in ours] == theirs
    draw = np.random.default_rng(side)
    for _ in range(300):
        width, height = (int(length) for length in draw.integers(100, 4000, 2))
        at = find_nearest_bucket(height, width, theirs)
        assert buckets.nearest_bucket((width, height), ours) == ours[at]


def test_every_picture_is_in_one_group_per_resolution() -> None:
    sizes = [(640, 480), (480, 640), (500, 500), (1000, 100)]
    assert buckets.group_by_bucket(sizes, (64,), buckets=False) == {(64, 64): (0, 1, 2, 3)}
    assert buckets.group_by_bucket(sizes, (64, 32), buckets=False) == {(32, 32): (0, 1, 2, 3), (64, 64): (0, 1, 2, 3)}
    bucketed = buckets.group_by_bucket(sizes, (512,), buckets=True)
    assert bucketed == {(448, 592): (1,), (512, 512): (2,), (592, 448): (0,), (720, 368): (3,)}


COUNTS = {(64, 64): 5, (48, 80): 2, (80, 48): 1}


def test_batches_show_every_view_equally_often_and_never_mix_sizes() -> None:
    seen: Counter[tuple[buckets.Size, int]] = Counter()
    epochs: dict[tuple[buckets.Size, int], list[int]] = {}
    for step in range(24):  # three cycles of eight, of three pictures each
        for micro in range(2):
            size, shown = buckets.draw_batch(0, step, micro, images=3, accumulate=2, counts=COUNTS)
            assert len(shown) == 3
            for index, epoch in shown:
                assert 0 <= index < COUNTS[size]
                seen[size, index] += 1
                epochs.setdefault((size, index), []).append(epoch)
    assert set(seen.values()) == {2 * 24 * 3 // 8}
    assert set(seen) == {(size, index) for size, count in COUNTS.items() for index in range(count)}
    assert all(found == sorted(set(found)) for found in epochs.values())  # the n-th showing is told as the n-th


def test_views_of_one_size_are_shown_in_shuffled_epochs() -> None:
    counts = {(64, 64): 9}
    drawn = [
        buckets.draw_batch(0, step, micro, images=3, accumulate=2, counts=counts)
        for step in range(21)
        for micro in range(2)
    ]
    shown = [index for _, batch in drawn for index, _ in batch]
    epochs = [shown[start : start + 9] for start in range(0, 126, 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert buckets.draw_batch(1, 0, 0, images=9, accumulate=1, counts=counts)[1] != [(index, 0) for index in epochs[0]]
    other = buckets.draw_batch(0, 0, 0, images=9, accumulate=1, counts=counts, what="class")[1]
    assert other != [(index, 0) for index in epochs[0]]


def test_variants_take_turns() -> None:
    for name in ("a", "b", "c"):
        first = buckets.variant(0, name, 0, 4)
        assert [buckets.variant(0, name, shown, 4) for shown in range(6)] == [(first + shown) % 4 for shown in range(6)]
