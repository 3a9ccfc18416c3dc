"""Laws, tried on drawn examples (hypothesis; the same ones each time): whatever is put in, these hold of what comes out."""

from __future__ import annotations

import copy
import itertools
import json
import math
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_spec_key import EXAMPLES, FACTS, LEAST, TEXT_LORA, TOKENS, laid_over

from runner.base.files import BUILTIN
from runner.base.layers import clip_layers, linear_layers, lora_layers
from runner.data import buckets
from runner.export import foreign_layouts, lora_layouts
from runner.export.lora_layouts import Adapter, Factors
from runner.plan.build import make_plan
from runner.plan.phases import Plan
from runner.spec.loader import Loaded, load
from runner.spec.origins import annotated
from runner.spec.rules import broken_rules, fill_defaults
from runner.spec.schema import Spec, dump
from runner.training import optimizers


def examples(count: int) -> Any:
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


# ---- specs ---------------------------------------------------------------------------------------------------------


def put(tables: dict[str, Any], key: str, value: Any) -> None:
    *names, last = key.split(".")
    table: Any = tables
    for name in names:
        table = table.setdefault(name, {})
        table = table[0] if isinstance(table, list) else table
    table[last] = copy.deepcopy(value)


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


def loaded(tables: dict[str, Any] | str) -> list[Loaded]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.toml"
        path.write_text(tables if isinstance(tables, str) else tomli_w.dumps(tables))
        return load([path])


@examples(60)
@given(specs())
def test_a_resolved_spec_is_the_spec(tables: dict[str, Any]) -> None:
    """What a run folder holds, every key and the comments that say where it came from, reads back as the same spec; so does
    that one's own. It is the same run, too."""
    first = loaded(tables)[0]
    text = annotated({**dump(first.spec), "fluxrun": {"version": "0"}}, first.source.origin)
    again = loaded(text)[0].spec
    assert again == first.spec
    assert dump(again) == dump(first.spec)
    assert make_plan(again, FACTS).key == make_plan(first.spec, FACTS).key
    assert tomllib.loads(text)["train"].get("steps") == first.spec.train.steps


SWEPT = {
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


# ---- plans ---------------------------------------------------------------------------------------------------------


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
    """Phases lie end to end from 0 to the last step. Where the schedule does not ask for the length, a step of the short run
    belongs to the long one as long as no phase ended otherwise before it; else no step does."""
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
    made = make_plan(loaded(tables)[0].spec, replace(FACTS, images=images))
    per_step = batch * accumulate
    assert made.steps * per_step >= (images - held) * repeats * epochs
    assert (made.steps / epochs - 1) * per_step < (images - held) * repeats


# ---- layouts -------------------------------------------------------------------------------------------------------

TINY = BUILTIN["builtin:tiny"]
LINEAR = linear_layers(json.loads((TINY / "transformer" / "config.json").read_text()))
CLIP = clip_layers(json.loads((TINY / "text_encoder" / "config.json").read_text()))
TRAINABLE = [*lora_layers(LINEAR, "all"), "proj_out", "norm_out.linear", "x_embedder"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factors(shape: tuple[int, int], rank: int, alpha: float, dtype: torch.dtype, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    out, inside = shape
    down, up = torch.randn(rank, inside, generator=generator), torch.randn(out, rank, generator=generator)
    return Factors(down.to(dtype), up.to(dtype), alpha)


@st.composite
def adapters(draw: Callable[[Any], Any]) -> Adapter:
    """Any layers, all of one rank, alpha and dtype, as a run trains them."""
    rank, alpha, dtype = draw(st.integers(1, 5)), draw(st.floats(0.1, 16)), draw(st.sampled_from(DTYPES))
    chosen = draw(st.lists(st.sampled_from(TRAINABLE), min_size=1, max_size=8, unique=True))
    text = draw(st.lists(st.sampled_from(list(CLIP)), max_size=3, unique=True))
    return Adapter(
        {name: factors(LINEAR[name], rank, alpha, dtype, seed) for seed, name in enumerate(chosen)},
        {name: factors(CLIP[name], rank, alpha, dtype, 100 + seed) for seed, name in enumerate(text)},
    )


@examples(30)
@given(adapters())
def test_the_original_layout_gives_back_the_factors(adapter: Adapter) -> None:
    """To the bit, also where several of them became one matrix."""
    back = foreign_layouts.read(lora_layouts.to_kohya(adapter), {}).adapter
    for ours, theirs in ((adapter.transformer, back.transformer), (adapter.text, back.text)):
        assert ours.keys() == theirs.keys()
        for name, part in ours.items():
            assert torch.equal(theirs[name].down, part.down), name
            assert torch.equal(theirs[name].up, part.up), name
            assert theirs[name].up.dtype == part.up.dtype
            assert theirs[name].scale == pytest.approx(part.scale, rel=1e-6)


@examples(30)
@given(adapters())
def test_diffusers_layout_gives_back_the_changes(adapter: Adapter) -> None:
    """The scale is in B there, in fp32 where its own dtype cannot hold that: nothing is rounded."""
    back = lora_layouts.from_diffusers(lora_layouts.to_diffusers(adapter), {})
    for ours, theirs in ((adapter.transformer, back.transformer), (adapter.text, back.text)):
        assert ours.keys() == theirs.keys()
        for name, part in ours.items():
            wanted = part.scale * (part.up.float() @ part.down.float())
            assert lora_layouts.difference(part, theirs[name]) <= 1e-6 * float(wanted.abs().max()), name


@examples(20)
@given(st.integers(1, 5), st.floats(0.25, 16), st.floats(0.25, 16))
def test_alpha_is_what_the_metadata_says(rank: int, own: float, other: float) -> None:
    """Of a diffusers file: the adapter's own, but for layers that a pattern names; the rank where nothing is said. By the
    reader of our files and by that of others'."""
    q, k = (f"transformer_blocks.0.attn.to_{letter}" for letter in "qk")
    made = {name: factors(LINEAR[name], rank, 1.0, torch.float32, seed) for seed, name in enumerate((q, k))}
    named = {f"transformer.{name}.lora_A.weight": one.down for name, one in made.items()}
    named |= {f"transformer.{name}.lora_B.weight": one.up for name, one in made.items()}
    plain = {"transformer.lora_alpha": own, "transformer.r": rank}
    patterned = {**plain, "transformer.alpha_pattern": {k: other}}
    for config, wanted in (({}, (rank, rank)), (plain, (own, own)), (patterned, (own, other))):
        for found in (lora_layouts.from_diffusers(named, config), foreign_layouts.read(named, config).adapter):
            scales = tuple(found.transformer[name].scale for name in (q, k))
            assert scales == pytest.approx([alpha / rank for alpha in wanted], rel=1e-6)


@examples(20)
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0.25, 8)), min_size=3, max_size=3))
def test_parts_of_any_rank_and_alpha_fuse_into_their_changes(parts: list[tuple[int, float]]) -> None:
    """As files of others have them: each part's change comes back, whatever its neighbours are."""
    names = [f"transformer_blocks.0.{name}" for name in lora_layouts.QKV]
    made = {
        name: factors(LINEAR[name], rank, alpha, torch.float32, seed)
        for seed, (name, (rank, alpha)) in enumerate(zip(names, parts, strict=True))
    }
    back = foreign_layouts.read(lora_layouts.to_kohya(Adapter(made, {})), {}).adapter.transformer
    for name, part in made.items():
        wanted = part.scale * (part.up @ part.down)
        found = back[name].scale * (back[name].up.float() @ back[name].down.float())
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())), name


# ---- schedules -----------------------------------------------------------------------------------------------------


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


# ---- buckets and batches -------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(64, 4000), st.integers(64, 4000))


@examples(60)
@given(
    st.lists(SIZES, min_size=1, max_size=12),
    st.lists(st.integers(2, 64).map(lambda n: 16 * n), min_size=1, max_size=3, unique=True),
)
def test_every_picture_is_in_the_bucket_of_its_shape(sizes: list[tuple[int, int]], sides: list[int]) -> None:
    """Once per resolution; sides are multiples of 16 and the area about that of the square; a picture twice as large is in the
    same bucket."""
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
