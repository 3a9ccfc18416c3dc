"""Which latents and text embeddings of a job the cache has already, and how many bytes the missing ones will take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from runner.base.architectures import architecture_of
from runner.base.files import clip_config, fingerprint, local_folder, transformer_config
from runner.cache import keys
from runner.cache.paths import cache_folder, entry_file, manifest_file
from runner.core.files import read_json
from runner.core.humanize import format_bytes
from runner.jobs.job import Job
from runner.plan.phases import Encode
from runner.spec.dtypes import BYTES, TORCH_NAMES, base_dtype

LATENT_CHANNELS = 2 * 16  # mean and log-variance of FLUX's 16 latent channels

Fingerprint = Callable[[Path], str]


@dataclass(frozen=True)
class CacheHits:
    """The entries of one kind. present, missing: how many the cache has and lacks. bytes: of the missing ones, on the
    disk."""

    present: int
    missing: int
    bytes: int


def cache_hits_of(jobs: Sequence[Job], runs: Path, *, on_gpu: bool) -> list[dict[str, CacheHits]]:
    """`cache_hits_for` each job. The files of a base that several jobs share are read once."""
    read_once = cache(fingerprint)
    return [cache_hits_for(job, runs, on_gpu=on_gpu, fingerprint_of=read_once) for job in jobs]


def cache_hits_for(
    job: Job, runs: Path, *, on_gpu: bool, fingerprint_of: Fingerprint = fingerprint
) -> dict[str, CacheHits]:
    """By kind ("latents", or a text encoder's name): what the first encode phase needs. An encoder that is trained
    encodes later, and is left out. {} where the base or the data set is not on this disk."""
    base, pictures = local_folder(job.spec.model.base), job.pictures
    if base is None or pictures is None:
        return {}
    spec, folder = job.spec, cache_folder(runs)
    dtype = base_dtype(spec.model.dtype, on_gpu=on_gpu)
    [first] = [phase for phase in job.plan.phases if isinstance(phase, Encode) and phase.at == 0]
    vae_dtype = "fp32" if dtype == "fp16" else dtype
    hits = {"latents": _latent_hits(job, folder, fingerprint_of(base / "vae"), vae_dtype)}
    encoders = architecture_of(transformer_config(spec.model.base, base)).encoders
    for encoder in (encoders[name] for name in first.encoders):
        fingerprints = {part: fingerprint_of(base / part) for part in encoder.parts}
        quantization = [spec.model.quantize] if encoder.large and spec.model.quantize != "none" else []
        wanted = {
            keys.text_key(encoder, entry, fingerprints, TORCH_NAMES[dtype], quantization=quantization)
            for entry in keys.entries(spec, pictures, job.plan.placeholders, encoder)
        }
        vectors = 1 if encoder.pooled else spec.model.max_sequence_length
        entry_bytes = BYTES[dtype] * _encoder_width(base, encoder.name) * vectors
        hits[encoder.name] = _count_hits(folder, encoder.name, wanted, entry_bytes)
    return hits


def latent_bytes(width: int, height: int, dtype: str) -> int:
    """Of one image's latents: the VAE makes one position of 8 x 8 pixels."""
    return width * height // 64 * LATENT_CHANNELS * BYTES[dtype]


def _latent_hits(job: Job, folder: Path, vae: str, dtype: str) -> CacheHits:
    """Keys of latents are hashes of pixels, so they are known only for a data set that was decoded before; the cache
    keeps a list of them. vae: fingerprint."""
    assert job.pictures is not None
    key = keys.views_key(job.spec, job.pictures.fingerprint, vae, TORCH_NAMES[dtype])
    key_by_view = read_json(manifest_file(folder, key)) if key else {}
    sizes = job.plan.sizes or {}
    entry_bytes = max((latent_bytes(width, height, dtype) for width, height in sizes), default=0)
    if key_by_view:
        return _count_hits(folder, "latents", {str(latent_key) for latent_key in key_by_view.values()}, entry_bytes)
    views = sum(sizes.values()) * (job.spec.data.variants or 1) + len(job.pictures.held_out)
    return CacheHits(0, views, views * entry_bytes)


def _count_hits(folder: Path, kind: str, wanted: set[str], entry_bytes: int) -> CacheHits:
    present = sum(entry_file(folder, kind, key).is_file() for key in wanted)
    missing = len(wanted) - present
    return CacheHits(present, missing, missing * entry_bytes)


def _encoder_width(base: Path, encoder: str) -> int:
    """Numbers of one vector that a text encoder gives."""
    if encoder == "clip":
        return int((clip_config(base) or {}).get("hidden_size", 768))
    config: Mapping[str, Any] = json.loads((base / "text_encoder_2" / "config.json").read_text(encoding="utf-8"))
    return int(config["d_model"])


# ---- as text and JSON ------------------------------------------------------------------------------------------------


def line(hits: Mapping[str, CacheHits]) -> str:
    """ "latents 10 of 10, t5 12 of 13; 24 KiB to make"."""
    parts = [f"{kind} {each.present} of {each.present + each.missing}" for kind, each in hits.items()]
    missing = sum(each.bytes for each in hits.values())
    return ", ".join(parts) + (f"; {format_bytes(missing)} to make" if missing else "; nothing to make")


def lines(jobs: Sequence[Job], runs: Path, *, on_gpu: bool) -> dict[str, str]:
    """By run name; without runs of which nothing can be told."""
    all_hits = zip(jobs, cache_hits_of(jobs, runs, on_gpu=on_gpu), strict=True)
    return {job.plan.name: f"in the cache: {line(hits)}" for job, hits in all_hits if hits}


def as_json(hits: Mapping[str, CacheHits]) -> dict[str, Any]:
    return {kind: {"there": each.present, "missing": each.missing, "bytes": each.bytes} for kind, each in hits.items()}
