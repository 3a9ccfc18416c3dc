"""What this machine has for the night: GPUs, memory, disk, libraries. No torch: `nvidia-smi` and the kernel are asked."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from runner import estimate, schemes
from runner.attention import ON_A_GPU, PACKAGES
from runner.basefiles import BUILTIN, KNOWN, linear_layers
from runner.diskuse import SPARE
from runner.engine import slots
from runner.errors import Held
from runner.finding import Finding, at, count, here, size
from runner.fitting import less_memory
from runner.forecast import night_bytes
from runner.plan import MOMENTS, Plan, Train, resident
from runner.prepare import Seen, jobs_of
from runner.shapes import read_shapes
from runner.spec import Spec

SMALL = 2**30  # bytes of weights below which a base needs no GPU

# Numbers in FLUX.1's parts beside the transformer (sums over the published files), for plans without its files.
FLUX1_PARTS = {"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656, "vae": 83_819_683}


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes; capability: CUDA's compute capability, e.g. 9.0."""

    name: str
    uuid: str
    model: str
    total: int
    free: int
    capability: float | None


def gpus_here() -> dict[str, Gpu] | None:
    """By number and by id; None where `nvidia-smi` cannot be asked."""
    ask = [
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total,memory.free,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found: dict[str, Gpu] = {}
    for line in said.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 6 and cells[3].isdecimal() and cells[4].isdecimal():
            capability = float(cells[5]) if re.fullmatch(r"\d+\.\d+", cells[5]) else None
            gpu = Gpu(cells[0], cells[1], cells[2], int(cells[3]) << 20, int(cells[4]) << 20, capability)
            found |= {gpu.name: gpu, gpu.uuid: gpu}  # CUDA_VISIBLE_DEVICES may name either
    return found


def numbers_of(base: str, found: Mapping[str, int]) -> Mapping[str, int]:
    """How many numbers each part of a base holds: read from its files, or known of FLUX.1 beforehand."""
    if base in KNOWN and not found:
        return {**FLUX1_PARTS, "transformer": sum(out * inside for out, inside in linear_layers(KNOWN[base]).values())}
    return found


@dataclass(frozen=True)
class Need:
    """Bytes that a run's phases take at most. least: weights, and what learns with its optimizer's numbers; likely: with
    activations and margin, by `runner.estimate`, None where the base's configs are not known."""

    least: int
    least_phase: str
    likely: int | None
    likely_phase: str


def needed(spec: Spec, plan: Plan, numbers: Mapping[str, int], on_gpu: bool) -> Need:
    """`numbers`: of each of the base's parts, as its files tell them."""
    each = estimate.BYTES[spec.model.dtype or ("bf16" if on_gpu else "fp32")]
    away = estimate.LARGE if on_gpu and spec.model.offload != "none" else ()
    most = (0, "")
    for phase in plan.phases:
        parts = [int(numbers.get(part, 0) * _bytes(spec, part, each)) for part in resident(phase) if part not in away]
        if isinstance(phase, Train):
            trained = sum(part.parameters or 0 for part in phase.trains)
            most = max(most, (int(sum(parts) + trained * 4 * (2 + MOMENTS[spec.optimizer.name])), phase.name))
        else:
            most = max(most, (max(parts, default=0), phase.name))  # one after the other
    likely, name = estimate.most(spec, plan, on_gpu=on_gpu) or (None, "")
    return Need(*most, likely, name)


def _bytes(spec: Spec, part: str, plain: float) -> float:
    """Of one number of a part."""
    return schemes.BYTES.get(spec.model.quantize, plain) if part in estimate.LARGE else plain


def check_devices(
    seen: Sequence[Seen], numbers: Mapping[str, Mapping[str, int]], asked: str | None, count: int, runs: Path
) -> Iterator[Finding]:
    """`numbers`: of each base's parts; `asked`, `count`: what --gpus and --slots say."""
    planned = [(one, one.plan) for one in seen if one.plan]
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
    there = gpus_here()
    if there is None:
        word = "is" if slots.NVIDIA.is_dir() else "neither it nor a GPU's driver is"
        yield here("warning", f"what the GPUs have cannot be told: nvidia-smi does not answer ({word} here)")
        return
    if absent := [name for name in names if slots.seen(name) not in there]:
        have = ", ".join(sorted({gpu.name for gpu in there.values()})) or "none"
        yield here(
            "error", f"--gpus: no such GPU (found {', '.join(absent)}; this machine has {have}); or use --gpus cpu"
        )
        return
    if "+cpu" in _version("torch"):
        yield here(
            "error",
            f"torch {_version('torch')} cannot use the GPU that is here; install torch with CUDA, or use --gpus cpu",
        )
    chosen = [there[slots.seen(name)] for name in names]
    for one, plan in planned:
        yield from _on_gpus(one, plan, chosen, numbers.get(one.spec.model.base, {}))
    yield here(
        "note",
        "GPUs: " + ", ".join(f"{gpu.name} {gpu.model}, {size(gpu.free)} of {size(gpu.total)} free" for gpu in chosen),
    )


def _on_gpus(seen: Seen, plan: Plan, gpus: Sequence[Gpu], numbers: Mapping[str, int]) -> Iterator[Finding]:
    spec = seen.spec
    if spec.compute.gpus > len(gpus):
        yield at(
            seen.source, "error", "compute.gpus",
            f"more GPUs than there are (found {spec.compute.gpus}, there are {len(gpus)}); lower it",
        )  # fmt: skip
    need = needed(spec, plan, numbers, on_gpu=True)
    gpu = min(gpus, key=lambda one: one.free)
    has = f"GPU {gpu.name} ({gpu.model}) has {size(gpu.free)} of {size(gpu.total)} free"
    if need.least > gpu.free:
        way = "use a larger GPU" if need.least > gpu.total else "end what holds its memory (`nvidia-smi` names it)"
        yield at(
            seen.source, "error", "model.base",
            f"phase {need.least_phase} needs at least {size(need.least)} for its weights, and {has}; {way}",
        )  # fmt: skip
    elif need.likely is not None and need.likely > gpu.free:
        yield at(
            seen.source, "warning", "model.base",
            f"phase {need.likely_phase} needs about {size(need.likely)}, margin included, and {has}; "
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
    each = estimate.BYTES[spec.model.dtype or "bf16"]
    largest = int(max((count * _bytes(spec, part, each) for part, count in numbers.items()), default=0))
    if available is not None and largest > available:
        yield at(
            seen.source, "warning", "model.base",
            f"the largest part takes {size(largest)} of this machine's memory while it is loaded, and {size(available)} are "
            "free, swap included; end other programs, or add swap",
        )  # fmt: skip


def _smaller(spec: Spec, plan: Plan, need: Need, gpu: Gpu) -> str:
    """What to do where the estimate is above what is free."""
    if need.likely is not None and need.likely <= gpu.total:
        return "end what holds its memory (`nvidia-smi` names it)"
    shapes = read_shapes(spec.model.base)
    for change in estimate.ways(spec, plan, shapes) if shapes else ():
        if change.needs <= gpu.free:
            return f"set {', '.join(change.keys)} ({size(change.needs)})"
    return "use a larger GPU"


def _on_the_cpu(
    planned: Sequence[tuple[Seen, Plan]], numbers: Mapping[str, Mapping[str, int]], told: bool
) -> Iterator[Finding]:
    available = memory_available()
    for one, plan in planned:
        of_base = numbers.get(one.spec.model.base, {})
        need = needed(one.spec, plan, of_base, on_gpu=False)
        if available is not None and need.least > available:
            yield at(
                one.source, "error", "model.base",
                f"phase {need.least_phase} needs at least {size(need.least)} for its weights on the CPU, and this machine has "
                f"{size(available)} of memory free, swap included; use a GPU, or a machine with more",
            )  # fmt: skip
        elif available is not None and need.likely is not None and need.likely > available:
            yield at(
                one.source, "warning", "model.base",
                f"phase {need.likely_phase} needs up to {size(need.likely)} on the CPU, and this machine has "
                f"{size(available)} of memory free, swap included; {less_memory(one.spec, on_gpu=False)}",
            )  # fmt: skip
        elif need.least > SMALL and not told:
            yield at(
                one.source, "warning", "model.base",
                f"no GPU was found, so {size(need.least)} of weights are trained on the CPU, where a step takes minutes; use a "
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


def _half(seen: Seen) -> Iterator[Finding]:
    if seen.spec.model.dtype == "fp16" and seen.spec.model.base not in BUILTIN:
        yield at(
            seen.source, "warning", "model.dtype",
            "fp16 is too narrow for FLUX.1's T5 and transformer, whose activations leave its range (found 'fp16'); use "
            "\"bf16\"",
        )  # fmt: skip


def memory_available() -> int | None:
    """Bytes of RAM and swap that are free to this process, or None where the kernel does not say."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    facts = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
    if "MemAvailable" not in facts:
        return None
    free = facts["MemAvailable"] + facts.get("SwapFree", 0)
    return min(free, *(limit - used for limit, used in _container())) if _container() else free


MEMINFO = Path("/proc/meminfo")


def _container() -> list[tuple[int, int]]:
    """(limit, used without what can be dropped) of the control group, where it has a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return []
    files = sum(int(line.split()[1]) for line in lines if line.split()[0] in ("active_file", "inactive_file"))
    return [(int(limit), max(0, used - files))] if limit.isdecimal() else []


# ---- disk ----------------------------------------------------------------------------------------------------------


def check_disk(
    seen: Sequence[Seen], runs: Path, gpus: str | None, download: int = 0, hub_cache: Path | None = None
) -> Iterator[Finding]:
    """What all runs will write against what is free. gpus: as --gpus takes them; `download`: bytes of bases that come into
    `hub_cache`."""
    jobs = [job for job in jobs_of(seen) if job.verdict.state != "done"]
    folders, cached = night_bytes(jobs, on_gpu=gpus != "cpu" and slots.NVIDIA.is_dir())
    disk = _existing(runs)
    free = shutil.disk_usage(disk).free
    with_base = download if hub_cache and _same_disk(_existing(hub_cache), disk) else 0
    need = folders + cached + with_base
    if jobs and need + SPARE > free:
        base = f", {size(with_base)} for the base's files" if with_base else ""
        ways = ["free some space"]
        ways += ["lower checkpoint.keep"] if any(job.spec.checkpoint.keep > 1 for job in jobs) else []
        ways += ["queue fewer specs"] if len(jobs) > 1 else []
        yield here(
            "error",
            f"disk: the night wants about {size(need + SPARE)} ({size(folders)} in {count(len(jobs), 'run folder')}, "
            f"{size(cached)} in the cache{base}, {size(SPARE)} to spare beside a checkpoint), and {runs} has room for "
            f"{size(free)}; {' or '.join(ways)}",
        )
    elif jobs:
        yield here(
            "note",
            f"disk: about {size(need)} will be written, {size(SPARE)} must stay free beside it, {size(free)} are free",
        )
    if hub_cache and download and not with_base and download > (room := shutil.disk_usage(_existing(hub_cache)).free):
        yield here(
            "error",
            f"disk: the base's files take {size(download)}, and {hub_cache} has room for {size(room)}; free some space, or "
            "set HF_HOME to a larger disk",
        )


def check_runs_folder(runs: Path) -> Iterator[Finding]:
    there = _existing(runs)
    if not os.access(there, os.W_OK | os.X_OK):
        yield here(
            "error",
            f"{runs} cannot be written: {there} may not be changed by this user; name another folder with --runs",
        )


def check_folder(seen: Seen) -> Iterator[Finding]:
    """Whether another queue has the run's folder."""
    if seen.verdict is None or seen.verdict.state == "done":
        return
    try:
        seen.run.refuse_if_held()
    except Held as error:
        yield at(seen.source, "warning", "name", f"{error}; a queue leaves this run out")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.resolve()
    return next(one for one in (path, *path.parents) if one.exists())


def _same_disk(one: Path, other: Path) -> bool:
    return os.stat(one).st_dev == os.stat(other).st_dev


# ---- libraries -----------------------------------------------------------------------------------------------------


def check_libraries(seen: Sequence[Seen]) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    for one in seen:
        yield from _optional(one)
    for text in requires("fluxrun") or ():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = _version(wanted.name)
        if not found:
            yield here("error", f"{wanted.name} is not installed, and fluxrun needs {wanted}; install fluxrun again")
        elif not wanted.specifier.contains(found, prereleases=True):
            yield here("warning", f"{wanted.name} {found} is not what fluxrun was made for, which is {wanted}")
    now = {"python": platform.python_version()} | {name: _version(name) for name in SHOWN}
    for one in seen:
        yield from _drifted(one, now)
    yield here("note", "versions: " + ", ".join(f"{name} {found}" for name, found in now.items()))


SHOWN = ("fluxrun", "torch", "diffusers", "transformers", "peft")


def _optional(seen: Seen) -> Iterator[Finding]:
    if seen.spec.optimizer.name == "adamw8bit" and find_spec("bitsandbytes") is None:
        yield at(
            seen.source, "error", "optimizer.name",
            'adamw8bit needs bitsandbytes, which is not installed; pip install "fluxrun[8bit]"',
        )  # fmt: skip
    if seen.spec.model.quantize == "nf4" and find_spec("bitsandbytes") is None:
        yield at(
            seen.source, "error", "model.quantize",
            'nf4 needs bitsandbytes, which is not installed; pip install "fluxrun[quant]", or use int8 or fp8, which need '
            "nothing",
        )  # fmt: skip
    package, wanted = PACKAGES.get(seen.spec.model.attention, ("torch", ""))
    if find_spec(package) is None:
        yield at(
            seen.source, "error", "model.attention",
            f'{seen.spec.model.attention} needs {package}, which is not installed; pip install "{wanted}", or use "native"',
        )  # fmt: skip
    if "wandb" in seen.spec.track.to and find_spec("wandb") is None:
        yield at(seen.source, "error", "track.to", 'wandb is not installed; pip install "fluxrun[wandb]"')


def _drifted(seen: Seen, now: Mapping[str, str]) -> Iterator[Finding]:
    """A run that goes on under other libraries than it was begun with does not end with the same bytes."""
    if seen.verdict is None or seen.verdict.state != "resume":
        return
    then = seen.run.state().get("versions")
    changed = [
        f"{name} {old} -> {now[name]}"
        for name, old in (then.items() if isinstance(then, dict) else ())
        if name in now and now[name] != old
    ]
    if changed:
        yield at(
            seen.source, "warning", "name",
            f"{seen.run.folder} was begun with other libraries ({', '.join(changed)}); it goes on, but not to the same bytes",
        )  # fmt: skip


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
