"""A training objective, set up as the first training phase has it, and its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner.checkpoint.storage import Weights
from runner.core.seeds import derive
from runner.plan.phases import Encode
from runner.training.context import RunContext
from runner.training.objective import FlowObjective
from runner.training.phases.encode import encode_phase
from runner.training.phases.train import load_encoders, load_transformer, trainable
from tests.support.house import House
from tests.support.runs import context_of


def spec_of(house: House, **changes: str) -> Path:
    """The house's pivotal spec with lines replaced; drop="tokens" leaves tokens and inversion out, `add` goes last."""
    add, drop = changes.pop("add", ""), changes.pop("drop", "")
    spec = house.spec("a", **changes)
    written = spec.read_text()
    if drop:
        start, stop = written.index("[[tokens]]"), written.index("[lora]")
        written = written[:start] + written[stop:]
    spec.write_text(written + add)
    return spec


def objective_of(
    context: RunContext, past: Weights | None = None
) -> tuple[FlowObjective, dict[str, dict[str, nn.Parameter]]]:
    """The first training phase's, with its caches filled."""
    encoding = next(phase for phase in context.plan.phases if isinstance(phase, Encode))
    phase, past = context.plan.training[0], past or Weights()
    encode_phase(context, encoding, past)
    transformer, adapter = load_transformer(context, phase, past)
    encoders = load_encoders(context, phase, past)
    return FlowObjective(context, transformer, encoders), trainable(phase, adapter, encoders)


def jolt(kinds: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    """Adapters begin without effect; give them one."""
    for kind in ("lora", "text_lora"):
        for name, parameter in kinds[kind].items():
            generator = torch.Generator().manual_seed(derive(3, name))
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def with_model(house: House, lines: str, **changes: str) -> Path:
    return spec_of(house, base=f'base = "builtin:tiny"\n{lines}', **changes)


def gradients(spec: Path) -> tuple[Tensor, dict[str, Tensor]]:
    objective, kinds = objective_of(context_of(spec))
    jolt(kinds)
    return stepped(objective, kinds)


def stepped(objective: Any, kinds: dict[str, dict[str, nn.Parameter]]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = objective.loss(2, 0)
    loss.backward()
    found = {}
    for kind in kinds.values():
        for name, value in kind.items():
            assert value.grad is not None
            assert value.grad.any()
            found[name] = value.grad
    return loss.detach(), found


def equal(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> bool:
    return torch.equal(one[0], other[0]) and all(torch.equal(one[1][name], other[1][name]) for name in other[1])


def count_calls(transformer: Any) -> list[str]:
    calls: list[str] = []
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    return calls
