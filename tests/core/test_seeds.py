"""Seeds derived from names."""

from __future__ import annotations

from runner.core.seeds import derive


def test_seeds_are_distinct_and_stable() -> None:
    assert derive(0, "noise", 1, 2) == derive(0, "noise", 1, 2)
    assert (
        len(
            {
                derive(seed, what, a, b)
                for seed in (0, 1)
                for what in ("noise", "dropout")
                for a in range(5)
                for b in range(5)
            }
        )
        == 100
    )
    assert derive(0, "a", 11) != derive(0, "a1", 1)
