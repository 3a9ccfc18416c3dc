"""Every number of every optimizer and schedule reaches the library that computes with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from runner.spec.defaults import fill_defaults
from runner.spec.schema import AdamW, AdamW8bit, Prodigy, Schedule, Spec
from runner.training.phases.train import build_optimizer, build_schedule
from tests.support.spec_examples import LEAST, laid_over

# Key -> another value than the default's, and where the library has it.
ADAM: dict[str, tuple[Any, Any]] = {
    "beta1": (0.5, lambda group: group["betas"][0]),
    "beta2": (0.25, lambda group: group["betas"][1]),
    "eps": (0.125, lambda group: group["eps"]),
    "weight_decay": (0.75, lambda group: group["weight_decay"]),
}
NUMBERS: dict[str, dict[str, tuple[Any, Any]]] = {
    "adamw": ADAM,
    "adamw8bit": ADAM,
    "prodigy": {
        **ADAM,
        "beta3": (0.5, lambda group: group["beta3"]),
        "decouple": (False, lambda group: group["decouple"]),
        "bias_correction": (False, lambda group: group["use_bias_correction"]),
        "safeguard_warmup": (False, lambda group: group["safeguard_warmup"]),
        "d_coef": (2.0, lambda group: group["d_coef"]),
        "d0": (0.5, lambda group: group["d0"]),
        "growth_rate": (1.5, lambda group: group["growth_rate"]),
    },
}
MODELS: dict[str, type[BaseModel]] = {"adamw": AdamW, "adamw8bit": AdamW8bit, "prodigy": Prodigy}


def spec_of(**tables: Any) -> Spec:
    return Spec.model_validate(fill_defaults(laid_over(LEAST, tables)))


def group_of(name: str, **numbers: Any) -> dict[str, Any]:
    spec = spec_of(optimizer={"name": name, **numbers})
    built = build_optimizer(spec, {"lora": {"lora/x": nn.Parameter(torch.zeros(2, 2))}})
    found: dict[str, Any] = built.torch.param_groups[0]
    return found


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in NUMBERS.items() for key in keys])
def test_a_number_reaches_its_optimizer(name: str, key: str) -> None:
    """And no other one's place."""
    value, place = NUMBERS[name][key]
    plain, changed = group_of(name), group_of(name, **{key: value})
    assert place(plain) != value
    assert place(changed) == value
    moved = [other for other, (_, at) in NUMBERS[name].items() if at(plain) != at(changed)]
    assert moved == [key]


def test_every_number_is_in_the_table() -> None:
    assert {name: set(model.model_fields) - {"name"} for name, model in MODELS.items()} == {
        name: set(keys) for name, keys in NUMBERS.items()
    }


@pytest.mark.parametrize("scale", [False, True])
def test_each_kind_of_parameter_has_its_own_rate_and_decay(scale: bool) -> None:
    """train.scale_lr multiplies all of them by the images of a step, on all GPUs."""
    spec = spec_of(
        tokens=[{"name": "TOK"}], inversion={"lr": 0.25, "weight_decay": 0.5}, optimizer={"name": "adamw", "weight_decay": 0.125},
        train={"lr": 0.5, "batch_size": 2, "accumulate": 3, "scale_lr": scale}, compute={"gpus": 2},
    )  # fmt: skip
    kinds = {kind: {f"{kind}/x": nn.Parameter(torch.zeros(2))} for kind in ("lora", "rows")}
    found = {
        next(iter(group.parameters)): (group.lr, group.weight_decay) for group in build_optimizer(spec, kinds).groups
    }
    times = 12 if scale else 1
    assert found == {"lora/x": (0.5 * times, 0.125), "rows/x": (0.25 * times, 0.5)}
    text = spec_of(
        text_lora={"rank": 2, "lr": 0.25}, optimizer={"name": "adamw", "weight_decay": 0.125}, train={"lr": 0.5}
    )
    kinds = {"text_lora": {"text_lora/x": nn.Parameter(torch.zeros(2))}}
    [group] = build_optimizer(text, kinds).groups
    assert (group.lr, group.weight_decay) == (0.25, 0.125)


def test_the_rate_that_is_told_is_each_kinds_own() -> None:
    """With the schedule's factor, which here halves both."""
    kinds = {kind: {f"{kind}/x": nn.Parameter(torch.zeros(2))} for kind in ("lora", "rows")}
    spec = spec_of(tokens=[{"name": "TOK"}], inversion={"lr": 0.25}, train={"lr": 0.5})
    built = build_optimizer(spec, kinds)
    for parameter in built.parameters:
        parameter.grad = torch.ones(2)
    built.step(0.5)
    assert built.learning_rates() == {"lora": 0.25, "rows": 0.125}
    assert [group["lr"] for group in built.torch.param_groups] == [0.25, 0.125]
    assert all(parameter.grad is None for parameter in built.parameters)


def test_every_number_of_a_schedule_reaches_it() -> None:
    """The run's steps, not those of a phase or of the spec."""
    own = Schedule(name="polynomial", warmup=2, power=2.0)
    context: Any = SimpleNamespace(spec=SimpleNamespace(schedule=own), plan=SimpleNamespace(steps=10))
    factor = build_schedule(context)
    assert [factor(step) for step in (0, 1, 2, 6)] == pytest.approx([0, 0.5, 1, 0.25], abs=1e-6)
    context.spec.schedule = Schedule(name="cosine_with_restarts", cycles=2)
    assert build_schedule(context)(5) == pytest.approx(1.0)  # the second one begins
    assert set(Schedule.model_fields) == {"name", "warmup", "cycles", "power"}
