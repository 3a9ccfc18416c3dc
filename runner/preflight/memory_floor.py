"""How many bytes a run needs at least, from its weights alone, and likely, with activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runner.base import quantized_size
from runner.jobs import memory
from runner.plan.description import resident
from runner.plan.disk import MOMENTS
from runner.plan.phases import Plan, TrainPhase
from runner.spec.dtypes import BYTES, base_dtype
from runner.spec.schema import Spec


@dataclass(frozen=True)
class MemoryFloor:
    """Bytes of the phase that needs most.

    least: weights, and trained parameters with their gradients and optimizer state. likely: with activations and a
    margin, as `runner.jobs.memory` estimates; None where the base's configs are not known.
    """

    least: int
    least_phase: str
    likely: int | None
    likely_phase: str


def memory_floor(spec: Spec, plan: Plan, parameters: Mapping[str, int], *, on_gpu: bool) -> MemoryFloor:
    """What the run needs on its device. parameters: of each of the base's parts, by its files."""
    offloaded = memory.LARGE if on_gpu and spec.model.offload != "none" else ()
    least = (0, "")
    for phase in plan.phases:
        parts = [part_bytes(spec, part, parameters, on_gpu=on_gpu) for part in resident(phase) if part not in offloaded]
        if isinstance(phase, TrainPhase):
            trained = sum(part.parameters or 0 for part in phase.trains)
            fp32_values = trained * (2 + MOMENTS[spec.optimizer.name])  # weights, gradients, moments
            least = max(least, (int(sum(parts) + 4 * fp32_values), phase.name))
        else:
            least = max(least, (max(parts, default=0), phase.name))  # parts are loaded one after the other
    likely, likely_phase = memory.peak(spec, plan, on_gpu=on_gpu) or (None, "")
    return MemoryFloor(*least, likely, likely_phase)


def part_bytes(spec: Spec, part: str, parameters: Mapping[str, int], *, on_gpu: bool) -> int:
    """Bytes of one part's weights, in the spec's dtype or quantization."""
    per_value: float = BYTES[base_dtype(spec.model.dtype, on_gpu=on_gpu)]
    if part in memory.LARGE:
        per_value = quantized_size.BYTES.get(spec.model.quantize, per_value)
    return int(parameters.get(part, 0) * per_value)
