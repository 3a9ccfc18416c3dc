"""Whether this machine has the GPUs and the memory that the runs need, by `nvidia-smi` and the kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from runner.base.files import BUILTIN
from runner.base.param_counts import read_base_configs
from runner.core import hardware
from runner.core.hardware import Gpu, memory_available, query_gpus
from runner.core.humanize import format_bytes
from runner.engine import slots
from runner.jobs import card_fit
from runner.jobs.card_fit import less_memory
from runner.jobs.job import Job
from runner.preflight import libraries
from runner.preflight.finding import Finding, at, here
from runner.preflight.memory_floor import MemoryFloor, memory_floor, part_bytes
from runner.spec.attention import GPU_ONLY

SMALL = 2**30  # bytes of weights below which a base trains well without a GPU
FREE_GPU = "end what holds its memory (`nvidia-smi` names it)"

Parameters = Mapping[str, Mapping[str, int]]  # by model.base, then by part


def check_devices(
    jobs: Sequence[Job], parameters: Parameters, gpus: str | None, slot_count: int, runs: Path
) -> Iterator[Finding]:
    """Check every planned job against the devices that its queue would use. gpus, slot_count: --gpus and --slots."""
    planned = [job for job in jobs if job.planned]
    if not planned:
        return
    gpus_per_run = max(job.spec.compute.gpus for job in planned)
    try:
        queue_slots = slots.make_slots(gpus, slot_count, gpus_per_run, runs)
    except ValueError as error:
        yield here("error", f"--gpus: {error}")
        return
    names = [name for slot in queue_slots if slot.gpus not in (None, "cpu") for name in str(slot.gpus).split(",")]
    if not names:
        for job in planned:
            yield from _check_cpu(job, parameters.get(job.spec.model.base, {}), chosen=gpus == "cpu")
        return
    machine_gpus = query_gpus()
    if machine_gpus is None:
        found = "is" if hardware.NVIDIA.is_dir() else "neither it nor a GPU's driver is"
        yield here("warning", f"the GPUs' memory is unknown: nvidia-smi does not answer ({found} here)")
        return
    if missing := [name for name in names if hardware.visible_gpu_id(name) not in machine_gpus]:
        existing = ", ".join(sorted({gpu.name for gpu in machine_gpus.values()})) or "none"
        yield here(
            "error", f"--gpus: no such GPU (found {', '.join(missing)}; this machine has {existing}); or use --gpus cpu"
        )
        return
    torch_version = libraries.version_of("torch")
    if "+cpu" in torch_version:
        yield here(
            "error", f"torch {torch_version} cannot use this machine's GPU; install torch with CUDA, or use --gpus cpu"
        )
    chosen = [machine_gpus[hardware.visible_gpu_id(name)] for name in names]
    for job in planned:
        yield from _check_gpus(job, chosen, parameters.get(job.spec.model.base, {}))
    memory = [f"{gpu.name} {gpu.model}, {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free" for gpu in chosen]
    yield here("note", f"GPUs: {', '.join(memory)}")


def _check_gpus(job: Job, gpus: Sequence[Gpu], parameters: Mapping[str, int]) -> Iterator[Finding]:
    """A run on GPUs: their number, memory and bf16, and the machine's memory while the base is loaded."""
    spec = job.spec
    if spec.compute.gpus > len(gpus):
        yield at(
            job.source, "error", "compute.gpus",
            f"more GPUs than there are (found {spec.compute.gpus}, there are {len(gpus)}); lower it",
        )  # fmt: skip
    floor = memory_floor(spec, job.plan, parameters, on_gpu=True)
    gpu = min(gpus, key=lambda gpu: gpu.free)
    has = f"GPU {gpu.name} ({gpu.model}) has {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free"
    if floor.least > gpu.free:
        remedy = "use a larger GPU" if floor.least > gpu.total else FREE_GPU
        yield at(
            job.source, "error", "model.base",
            f"phase {floor.least_phase} needs at least {format_bytes(floor.least)} for its weights, and {has}; {remedy}",
        )  # fmt: skip
    elif floor.likely is not None and floor.likely > gpu.free:
        yield at(
            job.source, "warning", "model.base",
            f"phase {floor.likely_phase} needs about {format_bytes(floor.likely)}, margin included, and {has}; "
            f"{_memory_remedy(job, floor, gpu)}; `fluxrun check SPEC --step` measures it",
        )  # fmt: skip
    if spec.model.dtype in (None, "bf16") and gpu.capability is not None and gpu.capability < 8:
        yield at(
            job.source, "warning", "model.dtype",
            f"GPU {gpu.name} ({gpu.model}) has no bf16 of its own, so it is slow (bf16 comes with compute capability 8.0, "
            f"this is {gpu.capability})",
        )  # fmt: skip
    yield from _check_fp16(job)
    available = memory_available()
    largest = max((part_bytes(spec, part, parameters, on_gpu=True) for part in parameters), default=0)
    if available is not None and largest > available:
        yield at(
            job.source, "warning", "model.base",
            f"the largest part takes {format_bytes(largest)} of this machine's memory while it is loaded, and "
            f"{format_bytes(available)} are free, swap included; end other programs, or add swap",
        )  # fmt: skip


def _memory_remedy(job: Job, floor: MemoryFloor, gpu: Gpu) -> str:
    """What to do where the likely need is above what is free."""
    if floor.likely is not None and floor.likely <= gpu.total:
        return FREE_GPU
    configs = read_base_configs(job.spec.model.base)
    for change in card_fit.memory_savings(job.spec, job.plan, configs) if configs else ():
        if change.needs <= gpu.free:
            return f"set {', '.join(change.keys)} ({format_bytes(change.needs)})"
    return "use a larger GPU"


def _check_cpu(job: Job, parameters: Mapping[str, int], *, chosen: bool) -> Iterator[Finding]:
    """A run on the CPU. chosen: the user asked for the CPU with --gpus."""
    spec, available = job.spec, memory_available()
    floor = memory_floor(spec, job.plan, parameters, on_gpu=False)
    if available is not None and floor.least > available:
        yield at(
            job.source, "error", "model.base",
            f"phase {floor.least_phase} needs at least {format_bytes(floor.least)} for its weights on the CPU, and this machine "
            f"has {format_bytes(available)} of memory free, swap included; use a GPU, or a machine with more",
        )  # fmt: skip
    elif available is not None and floor.likely is not None and floor.likely > available:
        yield at(
            job.source, "warning", "model.base",
            f"phase {floor.likely_phase} needs up to {format_bytes(floor.likely)} on the CPU, and this machine has "
            f"{format_bytes(available)} of memory free, swap included; {less_memory(spec, on_gpu=False)}",
        )  # fmt: skip
    elif floor.least > SMALL and not chosen:
        yield at(
            job.source, "warning", "model.base",
            f"no GPU was found, so {format_bytes(floor.least)} of weights are trained on the CPU, where a step takes minutes; "
            "use a machine with an NVIDIA GPU, or add --gpus cpu if that is meant",
        )  # fmt: skip
    if spec.model.attention in GPU_ONLY:
        yield at(
            job.source, "error", "model.attention",
            f"needs an NVIDIA GPU, and this run is on the CPU (found {spec.model.attention!r}); use \"native\"",
        )  # fmt: skip
    if spec.model.offload != "none":
        yield at(
            job.source, "warning", "model.offload",
            "this run is on the CPU, where it saves nothing and costs time; take this key out",
        )  # fmt: skip
    yield from _check_fp16(job)


def _check_fp16(job: Job) -> Iterator[Finding]:
    if job.spec.model.dtype == "fp16" and job.spec.model.base not in BUILTIN:
        yield at(
            job.source, "warning", "model.dtype",
            "fp16 is too narrow for FLUX.1's T5 and transformer, whose activations leave its range (found 'fp16'); use "
            "\"bf16\"",
        )  # fmt: skip
