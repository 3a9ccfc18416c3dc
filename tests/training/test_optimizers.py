"""Optimizers resume exactly; schedules are diffusers' as functions of the step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from runner.model import tensors
from runner.training import optimizers


@pytest.mark.parametrize(
    "hyperparameters",
    [
        optimizers.AdamWParams(0.9, 0.99, 1e-8),
        optimizers.ProdigyParams(0.9, 0.99, None, 1e-8, True, True, True, 1.0, 1e-6, None),
    ],
    ids=["adamw", "prodigy"],
)
def test_an_optimizer_goes_on_as_if_never_stopped(
    hyperparameters: optimizers.AdamWParams | optimizers.ProdigyParams, tmp_path: Path
) -> None:
    lr = 1.0 if isinstance(hyperparameters, optimizers.ProdigyParams) else 1e-2

    def build() -> tuple[dict[str, nn.Parameter], optimizers.Optimizer]:
        torch.manual_seed(0)
        # a zero parameter, as LoRA's B: Prodigy keeps a 0-dim state for it
        named = {
            "lora/a": nn.Parameter(torch.randn(3, 2)),
            "lora/b": nn.Parameter(torch.zeros(2, 3)),
            "rows/t5": nn.Parameter(torch.randn(4)),
        }
        groups = [
            optimizers.ParameterGroup({name: named[name] for name in ("lora/a", "lora/b")}, lr, 0.01),
            optimizers.ParameterGroup({"rows/t5": named["rows/t5"]}, lr, 0.1),
        ]
        return named, optimizers.Optimizer(groups, hyperparameters)

    def advance(named: dict[str, nn.Parameter], optimizer: optimizers.Optimizer, steps: range) -> None:
        """Gradients that mostly point one way, so that Prodigy's estimate d grows in every step."""
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in named.values():
                parameter.grad = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
            optimizer.step(1.0 - step / 100)

    unbroken, unbroken_optimizer = build()
    advance(unbroken, unbroken_optimizer, range(12))
    named, optimizer = build()
    advance(named, optimizer, range(5))
    kept, scalars = optimizer.state()
    tensors.save(tmp_path / "state", kept, {"scalars": json.dumps(scalars)})
    loaded, header = tensors.load(tmp_path / "state")
    resumed, again = build()
    for name, parameter in resumed.items():
        parameter.data.copy_(named[name].data)
    again.restore(loaded, json.loads(header["scalars"]))
    if isinstance(hyperparameters, optimizers.ProdigyParams):
        first, then = hyperparameters.d0, scalars["shared"]["d"]
        assert first < then < unbroken_optimizer.torch.param_groups[0]["d"]
    advance(resumed, again, range(5, 12))
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert again.state()[1] == unbroken_optimizer.state()[1]


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_a_schedule_is_diffusers_as_a_function_of_the_step(name: str) -> None:
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {"num_warmup_steps": 3, "num_training_steps": 20, "num_cycles": 2, "power": 2.0}
    stepped = get_scheduler(name, optimizer, **options)
    factor = optimizers.schedule(name, warmup=3, steps=20, cycles=2, power=2.0)
    for step in range(20):
        assert factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        stepped.step()
