"""How many bytes a queue of jobs will add to the disk: to the run folders, and to the cache that they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runner.base.layers import FLUX1
from runner.base.param_counts import CLIP, T5, VAE, BaseConfigs, read_base_configs
from runner.base.quantized_size import weight_bytes
from runner.cache import keys
from runner.cache.paths import cache_folder, quantized_folder
from runner.jobs.cache_hits import cache_hits_for, latent_bytes
from runner.jobs.job import Job
from runner.jobs.memory import LARGE
from runner.plan.build import resolutions
from runner.plan.disk import bytes_in, left_to_write
from runner.plan.phases import Encode
from runner.spec.dtypes import BYTES, base_dtype
from runner.spec.schema import Spec

ENTRY_OVERHEAD = 512  # bytes of a cache entry besides its numbers: its header, its name in the list of views


def queue_bytes(jobs: Sequence[Job], *, on_gpu: bool) -> tuple[int, int]:
    """(bytes in the run folders, bytes in the cache) that these jobs will add to what is there."""
    folders = sum(left_to_write(job.run.folder, job.plan.disk_bytes) for job in jobs)
    return folders, _cache_bytes(jobs, jobs[0].run.runs, on_gpu=on_gpu) if jobs else 0


def _cache_bytes(jobs: Sequence[Job], runs: Path, *, on_gpu: bool) -> int:
    """Jobs with the same images and base share the entries of the first encode phase. Entries of an encoder that was
    trained belong to one run."""
    shared: dict[str, int] = {}
    bases: dict[str, int] = {}
    per_run = quantized = 0
    for job in jobs:
        spec = job.spec
        key = spec.data.model_dump_json() + spec.model.model_dump_json()
        shared[key] = max(_first_encode_bytes(job, runs, on_gpu=on_gpu), shared.get(key, 0))
        encode_phases = [phase for phase in job.plan.phases if isinstance(phase, Encode)]
        per_run += sum(_later_encode_bytes(job, phase, on_gpu=on_gpu) for phase in encode_phases)
        if spec.model.quantize != "none":
            bases[spec.model.model_dump_json()] = _quantized_bytes(spec, on_gpu=on_gpu)
    if bases:
        quantized = max(0, sum(bases.values()) - bytes_in(quantized_folder(cache_folder(runs))))
    return sum(shared.values()) + per_run + quantized


def _first_encode_bytes(job: Job, runs: Path, *, on_gpu: bool) -> int:
    """Of the entries that the cache lacks. The entries of a hub base cannot be looked up before it is on this disk, so
    all of them count."""
    if hits := cache_hits_for(job, runs, on_gpu=on_gpu):
        return sum(each.bytes + ENTRY_OVERHEAD * each.missing for each in hits.values())
    if job.pictures is None:
        return 0
    spec, dtype = job.spec, base_dtype(job.spec.model.dtype, on_gpu=on_gpu)
    views = len(job.pictures.items) * (spec.data.variants or 1) + len(job.pictures.held_out)
    latents = sum(views * latent_bytes(side, side, dtype) for side in resolutions(spec))
    text_bytes = spec.model.max_sequence_length * int(T5["d_model"]) * BYTES[dtype]
    return latents + len(keys.captions(spec, job.pictures)) * text_bytes


def _later_encode_bytes(job: Job, phase: Encode, *, on_gpu: bool) -> int:
    """Of the embeddings by encoders that were trained before this phase."""
    if phase.at == 0 or job.pictures is None:
        return 0
    spec, configs = job.spec, read_base_configs(job.spec.model.base)
    width = configs.t5["d_model"] if configs else T5["d_model"]
    numbers = spec.model.max_sequence_length * width if "t5" in phase.encoders else 0
    text_bytes = int(numbers + CLIP["hidden_size"]) * BYTES[base_dtype(spec.model.dtype, on_gpu=on_gpu)]
    return len(keys.captions(spec, job.pictures)) * text_bytes


def _quantized_bytes(spec: Spec, *, on_gpu: bool) -> int:
    """Of the quantized transformer and T5, which are kept for later runs."""
    configs = read_base_configs(spec.model.base) or BaseConfigs(FLUX1, CLIP, T5, VAE)
    plain = BYTES[base_dtype(spec.model.dtype, on_gpu=on_gpu)]
    counts = [configs.parameters[part] for part in LARGE]
    return sum(weight_bytes(quantizable, other, spec.model.quantize, plain) for quantizable, other in counts)
