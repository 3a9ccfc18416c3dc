"""Each schedule is its formula, tried on drawn examples (hypothesis; the same ones each time)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.training import optimizers
from tests.support.laws import examples


def formula(name: str, step: int, warmup: int, steps: int, cycles: int, power: float) -> float:
    """The factor of the learning rate at a step, from 0; as diffusers' documentation describes each schedule."""
    if name == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    if name == "constant_with_warmup":
        return 1.0
    part = (step - warmup) / max(1, steps - warmup)
    if name == "linear":
        return max(0.0, 1 - part)
    if name == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * part)))
    if name == "cosine_with_restarts":
        return 0.0 if part >= 1 else max(0.0, 0.5 * (1 + math.cos(math.pi * ((cycles * part) % 1))))
    end = 1e-7  # of diffusers' polynomial, where the learning rate is 1
    return end if step > steps else (1 - end) * (1 - part) ** power + end


@examples(80)
@given(
    st.sampled_from(["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]),
    st.integers(1, 60), st.floats(0, 1), st.integers(1, 4), st.floats(0.5, 3),
)  # fmt: skip
def test_a_schedule_is_its_formula(name: str, steps: int, warm: float, cycles: int, power: float) -> None:
    warmup = 0 if name == "constant" else int(warm * steps)
    cycles = cycles if name == "cosine_with_restarts" else 1
    made = optimizers.schedule(name, warmup=warmup, steps=steps, cycles=cycles, power=power)
    for step in range(steps):
        assert made(step) == pytest.approx(formula(name, step, warmup, steps, cycles, power), abs=1e-9), step
