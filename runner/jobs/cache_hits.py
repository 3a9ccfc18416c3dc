"""Which of a run's latents and text embeddings the cache has already, and what making the others will take. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from runner.base.architectures import architecture_of
from runner.base.files import clip_config, fingerprint, local_folder, transformer_config
from runner.base.layers import FLUX1
from runner.base.param_counts import CLIP, T5, VAE, BaseConfigs, read_base_configs
from runner.base.quantized_size import weight_bytes
from runner.cache import keys
from runner.core.files import read_json
from runner.core.humanize import format_bytes
from runner.jobs.job import Job
from runner.jobs.memory import LARGE
from runner.plan.build import resolutions
from runner.plan.disk import bytes_in, left_to_write
from runner.plan.phases import Encode
from runner.spec.dtypes import BYTES, TORCH_NAMES, base_dtype
from runner.spec.schema import Spec

ENTRY = 512  # bytes that an entry takes beside its numbers: its header, its name in the list of views
CHANNELS = 2 * 16  # mean and log-variance of FLUX's 16 latent channels


@dataclass(frozen=True)
class CacheHits:
    """Of one kind: entries that are there, those to be made, and the bytes on the disk that these will be."""

    there: int
    missing: int
    bytes: int


Print = Callable[[Path], str]


def cache_hits_of(jobs: Sequence[Job], runs: Path, *, on_gpu: bool) -> list[dict[str, CacheHits]]:
    """In the jobs' order. The files of a base that several have are read once."""
    read = cache(fingerprint)
    return [cache_hits_for(job, runs, on_gpu=on_gpu, read=read) for job in jobs]


def cache_hits_for(job: Job, runs: Path, *, on_gpu: bool, read: Print = fingerprint) -> dict[str, CacheHits]:
    """By kind: "latents", "clip", "t5", as far as it can be told: a base or data set of the hub is looked at when it is
    here. Only what the first encode phase makes; what learns is encoded when it has learned."""
    folder, pictures = local_folder(job.spec.model.base), job.pictures
    if folder is None or pictures is None:
        return {}
    spec, entries_folder = job.spec, runs / "cache"
    dtype = base_dtype(spec.model.dtype, on_gpu=on_gpu)
    [first] = [phase for phase in job.plan.phases if isinstance(phase, Encode) and phase.at == 0]
    vae_dtype = "fp32" if dtype == "fp16" else dtype
    found = {"latents": _latents(job, entries_folder, read(folder / "vae"), vae_dtype)}
    encoders = architecture_of(transformer_config(spec.model.base, folder)).encoders
    for encoder in (encoders[name] for name in first.encoders):
        prints = {part: read(folder / part) for part in encoder.parts}
        entries = list(keys.entries(spec, pictures, job.plan.placeholders, encoder))
        held = [spec.model.quantize] if encoder.large and spec.model.quantize != "none" else []
        wanted = {keys.text_key(encoder, one, prints, TORCH_NAMES[dtype], held=held) for one in entries}
        each = BYTES[dtype] * _width(folder, encoder.name) * (1 if encoder.pooled else spec.model.max_sequence_length)
        found[encoder.name] = _hits(entries_folder, encoder.name, wanted, each)
    return found


def _latents(job: Job, cache: Path, vae: str, dtype: str) -> CacheHits:
    """The keys are of pixels, so they are known only where the data set was decoded before."""
    assert job.pictures is not None
    note = keys.views_key(job.spec, job.pictures.fingerprint, vae, TORCH_NAMES[dtype])
    known = read_json(cache / "views" / note[:2] / f"{note}.json") if note else {}
    sizes = job.plan.sizes or {}
    each = max((width * height // 64 for width, height in sizes), default=0) * CHANNELS * BYTES[dtype]
    if known:
        return _hits(cache, "latents", {str(key) for key in known.values()}, each)
    views = sum(sizes.values()) * (job.spec.data.variants or 1) + len(job.pictures.held)
    return CacheHits(0, views, views * each)


def _hits(cache: Path, kind: str, wanted: set[str], each: int) -> CacheHits:
    there = sum((cache / kind / key[:2] / f"{key}.safetensors").is_file() for key in wanted)
    return CacheHits(there, len(wanted) - there, (len(wanted) - there) * each)


def _width(folder: Path, encoder: str) -> int:
    if encoder == "clip":
        return int((clip_config(folder) or {}).get("hidden_size", 768))
    config: Mapping[str, Any] = json.loads((folder / "text_encoder_2" / "config.json").read_text(encoding="utf-8"))
    return int(config["d_model"])


def queue_bytes(jobs: Sequence[Job], *, on_gpu: bool) -> tuple[int, int]:
    """What these runs will add to (their folders, the cache), beside what is there."""
    folders = sum(left_to_write(job.run.folder, job.plan.disk_bytes) for job in jobs)
    return folders, _cache_bytes(jobs, jobs[0].run.runs, on_gpu=on_gpu) if jobs else 0


def _cache_bytes(jobs: Sequence[Job], runs: Path, *, on_gpu: bool) -> int:
    """Runs with the same pictures and base share what is made before anything is learned;
    what an encoder reads after it has learned is each run's own."""
    shared: dict[str, int] = {}
    own = quantized = 0
    bases: dict[str, int] = {}
    for job in jobs:
        spec = job.spec
        key = spec.data.model_dump_json() + spec.model.model_dump_json()
        found = cache_hits_for(job, runs, on_gpu=on_gpu)
        made = (
            sum(one.bytes + ENTRY * one.missing for one in found.values())
            if found
            else _made_of_a_hub_base(job, on_gpu=on_gpu)
        )
        shared[key] = max(made, shared.get(key, 0))
        own += sum(_read_again(job, phase, on_gpu=on_gpu) for phase in job.plan.phases if isinstance(phase, Encode))
        if spec.model.quantize != "none":
            bases[spec.model.model_dump_json()] = _quantized(spec, on_gpu=on_gpu)
    if bases:
        quantized = max(0, sum(bases.values()) - bytes_in(runs / "cache" / "quantized"))
    return sum(shared.values()) + own + quantized


def _made_of_a_hub_base(job: Job, *, on_gpu: bool) -> int:
    """As if nothing were there: its fingerprint, and so what is there of it, is not known before it is here."""
    if job.pictures is None:
        return 0
    spec = job.spec
    each = BYTES[base_dtype(spec.model.dtype, on_gpu=on_gpu)]
    views = len(job.pictures.items) * (spec.data.variants or 1) + len(job.pictures.held)
    latents = sum(views * CHANNELS * (side // 8) ** 2 * each for side in resolutions(spec))
    return latents + len(keys.captions(spec, job.pictures)) * spec.model.max_sequence_length * int(T5["d_model"]) * each


def _read_again(job: Job, phase: Encode, *, on_gpu: bool) -> int:
    """By the encoders that have learned before this phase."""
    if phase.at == 0 or job.pictures is None:
        return 0
    spec = job.spec
    each = BYTES[base_dtype(spec.model.dtype, on_gpu=on_gpu)]
    shapes = read_base_configs(spec.model.base)
    width = shapes.t5["d_model"] if shapes else T5["d_model"]
    long = spec.model.max_sequence_length * width if "t5" in phase.encoders else 0
    return len(keys.captions(spec, job.pictures)) * int(long + CLIP["hidden_size"]) * each


def _quantized(spec: Spec, *, on_gpu: bool) -> int:
    """The transformer and T5 as they are kept for the next run."""
    shapes = read_base_configs(spec.model.base) or BaseConfigs(FLUX1, CLIP, T5, VAE)
    plain = BYTES[base_dtype(spec.model.dtype, on_gpu=on_gpu)]
    counts = [shapes.parameters[part] for part in LARGE]
    return sum(weight_bytes(matrices, rest, spec.model.quantize, plain) for matrices, rest in counts)


def line(found: Mapping[str, CacheHits]) -> str:
    """For the plan of one run."""
    parts = [f"{kind} {one.there} of {one.there + one.missing}" for kind, one in found.items()]
    left = sum(one.bytes for one in found.values())
    return ", ".join(parts) + (f"; {format_bytes(left)} to make" if left else "; nothing to make")


def as_json(found: Mapping[str, CacheHits]) -> dict[str, Any]:
    return {kind: asdict(one) for kind, one in found.items()}


def lines(jobs: Sequence[Job], runs: Path, *, on_gpu: bool) -> dict[str, str]:
    """Of every run whose cache can be told."""
    told = zip(jobs, cache_hits_of(jobs, runs, on_gpu=on_gpu), strict=True)
    return {job.plan.name: f"in the cache: {line(found)}" for job, found in told if found}
