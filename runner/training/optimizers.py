"""Optimizers over named parameters, whose state is tensors and JSON numbers; learning-rate schedules as functions of the step."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runner.core.errors import FluxrunError


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate; names are those of the checkpoint."""

    parameters: Mapping[str, nn.Parameter]
    lr: float
    weight_decay: float

    @property
    def kind(self) -> str:
        """What they are, "lora", "rows" or "text_lora": the first part of their names."""
        return next(iter(self.parameters)).partition("/")[0]


@dataclass(frozen=True)
class Adam:
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class Adam8bit:
    """The same numbers, with moments in 8 bits a number (bitsandbytes; parameters under 4,096 numbers stay in 32)."""

    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class ProdigyNumbers:
    """prodigyopt's own numbers; one d, hence one lr, for all groups."""

    beta1: float
    beta2: float
    beta3: float | None
    eps: float
    decouple: bool
    bias_correction: bool
    safeguard_warmup: bool
    d_coef: float
    d0: float
    growth_rate: float | None


# What Prodigy learns besides tensors. It keeps them per group, equal in all groups.
PRODIGY_SCALARS = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")


class Optimizer:
    """A torch optimizer that knows its parameters by name."""

    def __init__(self, groups: list[ParameterGroup], numbers: Adam | Adam8bit | ProdigyNumbers) -> None:
        self.groups = groups
        self.names = {parameter: name for group in groups for name, parameter in group.parameters.items()}
        rows = [
            {"params": list(group.parameters.values()), "lr": group.lr, "weight_decay": group.weight_decay}
            for group in groups
        ]
        match numbers:
            case Adam():
                self.torch = _adamw(rows, numbers)
            case Adam8bit():
                self.torch = _adamw8bit(rows, numbers)
            case ProdigyNumbers():
                self.torch = _prodigy(rows, numbers)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.names)

    def step(self, factor: float) -> None:
        """One update with every group's lr times the schedule's `factor`; then the gradients are dropped."""
        for group, settings in zip(self.groups, self.torch.param_groups, strict=True):
            settings["lr"] = group.lr * factor
        self.torch.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.torch.zero_grad(set_to_none=True)

    def learning_rates(self) -> dict[str, float]:
        """The rate of each group's last update, by its kind; for Prodigy d * lr."""
        return {
            group.kind: float(settings["lr"] * settings.get("d", 1.0))
            for group, settings in zip(self.groups, self.torch.param_groups, strict=True)
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors as "NAME/STATE", numbers: {"parameters": {NAME: {STATE: n}}, "shared": {...}})."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, dict[str, Any]] = {}
        for parameter, name in self.names.items():
            for key, value in self.torch.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value
                else:
                    numbers.setdefault(name, {})[key] = value
        first = self.torch.param_groups[0]
        shared = {key: first[key] for key in PRODIGY_SCALARS if key in first}
        return tensors, {"parameters": numbers, "shared": shared}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Take over the state of those parameters that are here; what another phase trained is left behind."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, _, field = key.rpartition("/")
            by_name.setdefault(owner, {})[field] = value
        for parameter, name in self.names.items():
            state: dict[str, Any] = dict(scalars["parameters"].get(name, {}))
            for field, value in by_name.get(name, {}).items():
                # foreach AdamW counts its steps in CPU tensors, whatever the parameter's device
                state[field] = value.clone() if field == "step" else value.to(parameter.device, copy=True)
            if state:
                self.torch.state[parameter] = state
        for settings in self.torch.param_groups:
            settings.update(scalars["shared"])


def _adamw(rows: list[dict[str, Any]], numbers: Adam) -> torch.optim.Optimizer:
    return torch.optim.AdamW(rows, betas=(numbers.beta1, numbers.beta2), eps=numbers.eps, foreach=True)


def _adamw8bit(rows: list[dict[str, Any]], numbers: Adam8bit) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise FluxrunError(
            'optimizer.name = "adamw8bit" needs bitsandbytes, which is not installed; pip install "fluxrun[bitsandbytes]"'
        ) from error
    built: torch.optim.Optimizer = AdamW8bit(rows, betas=(numbers.beta1, numbers.beta2), eps=numbers.eps)
    return built


def _prodigy(rows: list[dict[str, Any]], numbers: ProdigyNumbers) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it announces its weight decay by print
        built: torch.optim.Optimizer = Prodigy(
            rows,
            betas=(numbers.beta1, numbers.beta2),
            beta3=numbers.beta3,
            eps=numbers.eps,
            weight_decay=max(row["weight_decay"] for row in rows),
            decouple=numbers.decouple,
            use_bias_correction=numbers.bias_correction,
            safeguard_warmup=numbers.safeguard_warmup,
            d_coef=numbers.d_coef,
            d0=numbers.d0,
            growth_rate=numbers.growth_rate or float("inf"),
        )
    return built


def schedule(
    name: Literal["constant"] | str, *, warmup: int, steps: int, cycles: float, power: float
) -> Callable[[int], float]:
    """diffusers' schedule as a function: optimisation step (from 0) -> factor of the learning rate.

    A function of the step needs no state: a resumed run and an extended one read the same curve.
    """
    from diffusers.optimization import get_scheduler

    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    built = get_scheduler(
        name,
        dummy,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        num_cycles=cycles,
        power=power,  # type: ignore[arg-type]
    )
    factor: Callable[[int], float] = built.lr_lambdas[0]  # type: ignore[attr-defined]
    return factor
