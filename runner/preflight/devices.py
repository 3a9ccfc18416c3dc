"""What this machine has for the night: GPUs, memory, disk, libraries. No torch: `nvidia-smi` and the kernel are asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.base import quantized_size
from runner.base.files import BUILTIN
from runner.base.param_counts import read_base_configs
from runner.core import hardware
from runner.core.hardware import Gpu, memory_available, query_gpus
from runner.core.humanize import format_bytes
from runner.engine import slots
from runner.jobs import card_fit, memory
from runner.jobs.card_fit import less_memory
from runner.jobs.job import Job
from runner.plan.description import resident
from runner.plan.disk import MOMENTS
from runner.plan.phases import Plan, TrainPhase
from runner.preflight import libraries
from runner.preflight.finding import Finding, at, here
from runner.spec.attention import ON_A_GPU
from runner.spec.dtypes import BYTES, base_dtype
from runner.spec.schema import Spec

SMALL = 2**30  # bytes of weights below which a base needs no GPU


@dataclass(frozen=True)
class MemoryFloor:
    """Bytes that a run's phases take at most. least: weights, and what learns with its optimizer's numbers; likely: with
    activations and margin, by `runner.jobs.memory`, None where the base's configs are not known."""

    least: int
    least_phase: str
    likely: int | None
    likely_phase: str


def memory_floor(spec: Spec, plan: Plan, numbers: Mapping[str, int], on_gpu: bool) -> MemoryFloor:
    """`numbers`: of each of the base's parts, as its files tell them."""
    each = BYTES[base_dtype(spec.model.dtype, on_gpu=on_gpu)]
    away = memory.LARGE if on_gpu and spec.model.offload != "none" else ()
    most = (0, "")
    for phase in plan.phases:
        parts = [int(numbers.get(part, 0) * _bytes(spec, part, each)) for part in resident(phase) if part not in away]
        if isinstance(phase, TrainPhase):
            trained = sum(part.parameters or 0 for part in phase.trains)
            most = max(most, (int(sum(parts) + trained * 4 * (2 + MOMENTS[spec.optimizer.name])), phase.name))
        else:
            most = max(most, (max(parts, default=0), phase.name))  # one after the other
    likely, name = memory.peak(spec, plan, on_gpu=on_gpu) or (None, "")
    return MemoryFloor(*most, likely, name)


def _bytes(spec: Spec, part: str, plain: float) -> float:
    """Of one number of a part."""
    return quantized_size.BYTES.get(spec.model.quantize, plain) if part in memory.LARGE else plain


def check_devices(
    seen: Sequence[Job], numbers: Mapping[str, Mapping[str, int]], asked: str | None, count: int, runs: Path
) -> Iterator[Finding]:
    """`numbers`: of each base's parts; `asked`, `count`: what --gpus and --slots say."""
    planned = [(one, one.plan) for one in seen if one.planned]
    if not planned:
        return
    most = max(one.spec.compute.gpus for one, _ in planned)
    try:
        places = slots.make_slots(asked, count, most, runs)
    except ValueError as error:
        yield here("error", f"--gpus: {error}")
        return
    names = [name for place in places if place.gpus not in (None, "cpu") for name in str(place.gpus).split(",")]
    if not names:
        yield from _on_the_cpu(planned, numbers, told=asked == "cpu")
        return
    there = query_gpus()
    if there is None:
        word = "is" if hardware.NVIDIA.is_dir() else "neither it nor a GPU's driver is"
        yield here("warning", f"what the GPUs have cannot be told: nvidia-smi does not answer ({word} here)")
        return
    if absent := [name for name in names if hardware.visible_gpu_id(name) not in there]:
        have = ", ".join(sorted({gpu.name for gpu in there.values()})) or "none"
        yield here(
            "error", f"--gpus: no such GPU (found {', '.join(absent)}; this machine has {have}); or use --gpus cpu"
        )
        return
    if "+cpu" in libraries.version_of("torch"):
        yield here(
            "error",
            f"torch {libraries.version_of('torch')} cannot use the GPU that is here; install torch with CUDA, or use --gpus cpu",
        )
    chosen = [there[hardware.visible_gpu_id(name)] for name in names]
    for one, plan in planned:
        yield from _on_gpus(one, plan, chosen, numbers.get(one.spec.model.base, {}))
    yield here(
        "note",
        "GPUs: "
        + ", ".join(
            f"{gpu.name} {gpu.model}, {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free" for gpu in chosen
        ),
    )


def _on_gpus(seen: Job, plan: Plan, gpus: Sequence[Gpu], numbers: Mapping[str, int]) -> Iterator[Finding]:
    spec = seen.spec
    if spec.compute.gpus > len(gpus):
        yield at(
            seen.source, "error", "compute.gpus",
            f"more GPUs than there are (found {spec.compute.gpus}, there are {len(gpus)}); lower it",
        )  # fmt: skip
    need = memory_floor(spec, plan, numbers, on_gpu=True)
    gpu = min(gpus, key=lambda one: one.free)
    has = f"GPU {gpu.name} ({gpu.model}) has {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free"
    if need.least > gpu.free:
        way = "use a larger GPU" if need.least > gpu.total else "end what holds its memory (`nvidia-smi` names it)"
        yield at(
            seen.source, "error", "model.base",
            f"phase {need.least_phase} needs at least {format_bytes(need.least)} for its weights, and {has}; {way}",
        )  # fmt: skip
    elif need.likely is not None and need.likely > gpu.free:
        yield at(
            seen.source, "warning", "model.base",
            f"phase {need.likely_phase} needs about {format_bytes(need.likely)}, margin included, and {has}; "
            f"{_smaller(spec, plan, need, gpu)}; `fluxrun check SPEC --step` measures it",
        )  # fmt: skip
    if spec.model.dtype in (None, "bf16") and gpu.capability is not None and gpu.capability < 8:
        yield at(
            seen.source, "warning", "model.dtype",
            f"GPU {gpu.name} ({gpu.model}) has no bf16 of its own, so it is slow (bf16 comes with compute capability 8.0, "
            f"this is {gpu.capability})",
        )  # fmt: skip
    yield from _half(seen)
    available = memory_available()
    each = BYTES[base_dtype(spec.model.dtype, on_gpu=True)]
    largest = int(max((count * _bytes(spec, part, each) for part, count in numbers.items()), default=0))
    if available is not None and largest > available:
        yield at(
            seen.source, "warning", "model.base",
            f"the largest part takes {format_bytes(largest)} of this machine's memory while it is loaded, and {format_bytes(available)} are "
            "free, swap included; end other programs, or add swap",
        )  # fmt: skip


def _smaller(spec: Spec, plan: Plan, need: MemoryFloor, gpu: Gpu) -> str:
    """What to do where the estimate is above what is free."""
    if need.likely is not None and need.likely <= gpu.total:
        return "end what holds its memory (`nvidia-smi` names it)"
    shapes = read_base_configs(spec.model.base)
    for change in card_fit.memory_savings(spec, plan, shapes) if shapes else ():
        if change.needs <= gpu.free:
            return f"set {', '.join(change.keys)} ({format_bytes(change.needs)})"
    return "use a larger GPU"


def _on_the_cpu(
    planned: Sequence[tuple[Job, Plan]], numbers: Mapping[str, Mapping[str, int]], told: bool
) -> Iterator[Finding]:
    available = memory_available()
    for one, plan in planned:
        of_base = numbers.get(one.spec.model.base, {})
        need = memory_floor(one.spec, plan, of_base, on_gpu=False)
        if available is not None and need.least > available:
            yield at(
                one.source, "error", "model.base",
                f"phase {need.least_phase} needs at least {format_bytes(need.least)} for its weights on the CPU, and this machine has "
                f"{format_bytes(available)} of memory free, swap included; use a GPU, or a machine with more",
            )  # fmt: skip
        elif available is not None and need.likely is not None and need.likely > available:
            yield at(
                one.source, "warning", "model.base",
                f"phase {need.likely_phase} needs up to {format_bytes(need.likely)} on the CPU, and this machine has "
                f"{format_bytes(available)} of memory free, swap included; {less_memory(one.spec, on_gpu=False)}",
            )  # fmt: skip
        elif need.least > SMALL and not told:
            yield at(
                one.source, "warning", "model.base",
                f"no GPU was found, so {format_bytes(need.least)} of weights are trained on the CPU, where a step takes minutes; use a "
                "machine with an NVIDIA GPU, or say --gpus cpu if that is meant",
            )  # fmt: skip
        if one.spec.model.attention in ON_A_GPU:
            yield at(
                one.source, "error", "model.attention",
                f"needs an NVIDIA GPU, and this run is on the CPU (found {one.spec.model.attention!r}); use \"native\"",
            )  # fmt: skip
        if one.spec.model.offload != "none":
            yield at(
                one.source, "warning", "model.offload",
                "this run is on the CPU, where it saves nothing and costs time; take this key out",
            )  # fmt: skip
        yield from _half(one)


def _half(seen: Job) -> Iterator[Finding]:
    if seen.spec.model.dtype == "fp16" and seen.spec.model.base not in BUILTIN:
        yield at(
            seen.source, "warning", "model.dtype",
            "fp16 is too narrow for FLUX.1's T5 and transformer, whose activations leave its range (found 'fp16'); use "
            "\"bf16\"",
        )  # fmt: skip
