"""The loss curve of the model card."""

from __future__ import annotations


def test_the_curve_has_few_points_however_long_the_run() -> None:
    from runner.training.loop import CURVE_POINTS, _extended

    curve: list[list[float]] = []
    for step in range(1, 3001):
        curve = _extended(curve, step, float(step))
    assert curve == [[step, float(step)] for step in range(8, 3001, 8)]
    assert len(curve) <= CURVE_POINTS
    short: list[list[float]] = []
    for step in range(1, 100):
        short = _extended(short, step, 0.5)
    assert [point[0] for point in short] == list(range(1, 100))
    full = [[step, 0.5] for step in range(1, 513)]  # as many as there may be
    assert _extended(full[:-1], 512, 0.5) == full
    assert _extended(full, 513, 0.5) == full
    assert _extended(full, 514, 0.5) == [[step, 0.5] for step in range(2, 515, 2)]
