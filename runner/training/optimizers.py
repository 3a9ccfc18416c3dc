"""Optimizers over named parameters, with state that fits a checkpoint, and learning-rate schedules as functions of the
step."""

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
    """Parameters that share a learning rate, by their names in checkpoints ("lora/...", "rows/...",
    "text_lora/...")."""

    parameters: Mapping[str, nn.Parameter]
    lr: float
    weight_decay: float

    @property
    def kind(self) -> str:
        """ "lora", "rows" or "text_lora": the first part of the names."""
        return next(iter(self.parameters)).partition("/")[0]


@dataclass(frozen=True)
class AdamWParams:
    """The hyperparameters of AdamW."""

    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class AdamW8bitParams:
    """The hyperparameters of bitsandbytes' AdamW, which keeps its moments in 8 bits. Parameters of fewer than 4,096
    values keep them in 32."""

    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class ProdigyParams:
    """The hyperparameters of prodigyopt's Prodigy. It estimates one step size d for all groups, so they share one
    lr."""

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


# What Prodigy estimates besides tensors. It keeps a copy in each group; all are equal.
PRODIGY_SCALARS = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")


class Optimizer:
    """A torch optimizer (`.torch`) that knows its parameters by name."""

    def __init__(
        self, groups: list[ParameterGroup], hyperparameters: AdamWParams | AdamW8bitParams | ProdigyParams
    ) -> None:
        self.groups = groups
        self.names = {parameter: name for group in groups for name, parameter in group.parameters.items()}
        torch_groups = [
            {"params": list(group.parameters.values()), "lr": group.lr, "weight_decay": group.weight_decay}
            for group in groups
        ]
        match hyperparameters:
            case AdamWParams():
                self.torch = _adamw(torch_groups, hyperparameters)
            case AdamW8bitParams():
                self.torch = _adamw8bit(torch_groups, hyperparameters)
            case ProdigyParams():
                self.torch = _prodigy(torch_groups, hyperparameters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.names)

    def step(self, factor: float) -> None:
        """Update the parameters, with each group's lr times the schedule's `factor`, then clear the gradients."""
        for group, settings in zip(self.groups, self.torch.param_groups, strict=True):
            settings["lr"] = group.lr * factor
        self.torch.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.torch.zero_grad(set_to_none=True)

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each group's last update, by kind. For Prodigy it is d * lr."""
        return {
            group.kind: float(settings["lr"] * settings.get("d", 1.0))
            for group, settings in zip(self.groups, self.torch.param_groups, strict=True)
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state for a checkpoint: (tensors as "PARAMETER/STATE", numbers).

        numbers: {"parameters": {PARAMETER: {STATE: number}}, "shared": Prodigy's scalars}. The tensors are the
        optimizer's own, in its dtypes, not copies.
        """
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
        """Load what `state` returned. The state of parameters that this optimizer does not have is ignored: an earlier
        phase trained them."""
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


def _adamw(groups: list[dict[str, Any]], hyperparameters: AdamWParams) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, betas=(hyperparameters.beta1, hyperparameters.beta2), eps=hyperparameters.eps, foreach=True
    )


def _adamw8bit(groups: list[dict[str, Any]], hyperparameters: AdamW8bitParams) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise FluxrunError(
            'optimizer.name = "adamw8bit" needs bitsandbytes, which is not installed; pip install "fluxrun[bitsandbytes]"'
        ) from error
    built: torch.optim.Optimizer = AdamW8bit(
        groups, betas=(hyperparameters.beta1, hyperparameters.beta2), eps=hyperparameters.eps
    )
    return built


def _prodigy(groups: list[dict[str, Any]], hyperparameters: ProdigyParams) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line about weight decay
        built: torch.optim.Optimizer = Prodigy(
            groups,
            betas=(hyperparameters.beta1, hyperparameters.beta2),
            beta3=hyperparameters.beta3,
            eps=hyperparameters.eps,
            weight_decay=max(group["weight_decay"] for group in groups),
            decouple=hyperparameters.decouple,
            use_bias_correction=hyperparameters.bias_correction,
            safeguard_warmup=hyperparameters.safeguard_warmup,
            d_coef=hyperparameters.d_coef,
            d0=hyperparameters.d0,
            growth_rate=hyperparameters.growth_rate or float("inf"),
        )
    return built


def schedule(
    name: Literal["constant"] | str, *, warmup: int, steps: int, cycles: float, power: float
) -> Callable[[int], float]:
    """A schedule of diffusers as a function: optimization step, from 0 -> factor of the learning rate.

    It has no state, so a resumed run continues on the same curve. warmup, steps: in optimization steps. cycles, power:
    for the schedules that have them.
    """
    from diffusers.optimization import get_scheduler

    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    built = get_scheduler(
        name,
        dummy,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        num_cycles=cycles,
        power=power,
    )
    factor: Callable[[int], float] = built.lr_lambdas[0]
    return factor
