"""Laws of specs and sweeps, tried on drawn examples (hypothesis; the same ones each time)."""

from __future__ import annotations

import copy
import itertools
import math
import tomllib
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from runner.plan.build import make_plan
from runner.spec.defaults import fill_defaults
from runner.spec.origins import annotated
from runner.spec.rules import broken_rules
from runner.spec.schema import Spec, dump
from tests.support.laws import examples, loaded, put
from tests.support.spec_examples import EXAMPLES, FACTS, LEAST, TEXT_LORA, TOKENS, laid_over


@st.composite
def specs(draw: Callable[[Any], Any]) -> dict[str, Any]:
    """A spec with up to twelve keys at other values than their defaults, as one writes it; only such as go together."""
    tables = laid_over(LEAST, draw(st.sampled_from([{}, TOKENS, TEXT_LORA])))
    for key in draw(st.lists(st.sampled_from(list(EXAMPLES)), max_size=12)):
        value, more = EXAMPLES[key]
        wider = laid_over(tables, {name: table for name, table in more.items() if name not in ("tokens", "text_lora")})
        put(wider, key, value)
        tables = wider if _goes_together(wider) else tables
    return tables


def _goes_together(tables: dict[str, Any]) -> bool:
    try:
        spec = Spec.model_validate(fill_defaults(tables))
    except ValueError:
        return False
    return not list(broken_rules(spec, tables))


@examples(60)
@given(specs())
def test_a_resolved_spec_is_the_spec(tables: dict[str, Any]) -> None:
    """What a run folder holds, every key and the comments that say where it came from, reads back as the same spec; so
    does that one's own. It is the same run, too."""
    first = loaded(tables)[0]
    text = annotated({**dump(first.spec), "fluxrun": {"version": "0"}}, first.source.origin)
    again = loaded(text)[0].spec
    assert again == first.spec
    assert dump(again) == dump(first.spec)
    assert make_plan(again, FACTS).key == make_plan(first.spec, FACTS).key
    assert tomllib.loads(text)["train"].get("steps") == first.spec.train.steps


SWEPT: dict[str, Sequence[object]] = {
    "lora.rank": [2, 4, 8], "train.lr": [1e-3, 1e-4], "seed": [0, 1, 2], "schedule.name": ["constant", "cosine"],
    "data.random_flip": [True, False], "train.weighting.scheme": ["none", "cosmap"],
}  # fmt: skip


@examples(25)
@given(
    st.dictionaries(st.sampled_from(list(SWEPT)), st.integers(1, 3), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_a_sweep_is_the_product_of_its_lists(chosen: dict[str, int], shuffle: Any) -> None:
    """One run each, in the lists' order, the last list first; each is the spec that one would have written by hand."""
    lists = {key: shuffle.sample(SWEPT[key], min(count, len(SWEPT[key]))) for key, count in chosen.items()}
    runs = loaded({**LEAST, "sweep": lists})
    product = list(itertools.product(*lists.values()))
    assert len(runs) == len(product) == math.prod(map(len, lists.values()))
    assert len({run.spec.name.lower() for run in runs}) == len(runs)
    for run, values in zip(runs, product, strict=True):
        by_hand = copy.deepcopy(LEAST)
        for key, value in zip(lists, values, strict=True):
            put(by_hand, key, value)
        assert run.spec.model_copy(update={"name": "a"}) == loaded(by_hand)[0].spec
        assert run.spec.name.split("/")[0] == "a"
        assert run.source.swept == dict(zip(lists, values, strict=True))
