"""A law of plans, tried on drawn examples (hypothesis; the same ones each time)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from runner.plan.build import make_plan
from runner.plan.phases import Plan
from tests.support.laws import examples, loaded
from tests.support.spec_examples import FACTS, LEAST, TOKENS, laid_over


@st.composite
def lengths(draw: Callable[[Any], Any]) -> tuple[dict[str, Any], int, int]:
    """(a spec, its steps, more steps); the pivot where it is in both."""
    short = draw(st.integers(2, 40))
    long = short + draw(st.integers(1, 40))
    tables = laid_over(LEAST, draw(st.sampled_from([{}, TOKENS, {"text_lora": {"rank": 2, "until": 0.5}}])))
    return tables, short, long


def plan_at(tables: dict[str, Any], steps: int, **train: Any) -> Plan:
    return make_plan(loaded(laid_over(tables, {"train": {"steps": steps, **train}}))[0].spec, FACTS)


@examples(40)
@given(lengths(), st.sampled_from(["constant", "constant_with_warmup", "linear", "cosine", "polynomial"]))
def test_a_longer_run_begins_as_the_shorter_one(drawn: tuple[dict[str, Any], int, int], schedule: str) -> None:
    """Phases lie end to end from 0 to the last step. Where the schedule does not ask for the length, a step of the
    short run belongs to the long one as long as no phase ended otherwise before it; else no step does."""
    tables, short, long = drawn
    tables = laid_over(tables, {"schedule": {"name": schedule}})
    one, other = plan_at(tables, short), plan_at(tables, long)
    for plan, steps in ((one, short), (other, long)):
        spans = [(phase.start, phase.stop) for phase in plan.training]
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
        assert spans[-1][1] == plan.steps == steps
        assert all(start < stop for start, stop in spans)
    assert one.training_key != other.training_key
    assert one.key != other.key  # done at the shorter length is not done at the longer one
    pivots = [plan.training[0].stop for plan in (one, other)]
    for phase in one.training:
        fits = any(phase.key == there.key and phase.start == there.start for there in other.training)
        assert fits == (schedule.startswith("constant") and (phase.start == 0 or pivots[0] == pivots[1]))
    keys = [phase.key for plan in (one, other) for phase in plan.phases]
    shared = {phase.key for phase in one.phases} & {phase.key for phase in other.phases}
    assert len(set(keys)) == len(keys) - len(shared)  # no key stands for two phases
