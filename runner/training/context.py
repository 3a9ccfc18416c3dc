"""What the phases of one run share: spec, plan, pictures, base model, cache; and which cache entries the run needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from runner.base.architectures import TextEncoder
from runner.base.files import PARTS as PARTS_OF_BASE
from runner.base.files import BaseIdentity, fingerprint, local_folder
from runner.cache import keys
from runner.cache.keys import Entry
from runner.cache.paths import cache_folder
from runner.cache.store import Cache
from runner.checkpoint.storage import Weights
from runner.core import hashing
from runner.core.errors import InterruptedRunError
from runner.core.events import EventLog
from runner.core.hashing import content_key
from runner.data import class_images, images, tokens
from runner.data.buckets import CropView, Size, group_by_bucket
from runner.data.images import Picture, Pictures
from runner.model import base as bases
from runner.model import device
from runner.model.base import Base
from runner.model.families import family_of
from runner.model.family import ModelFamily
from runner.model.tensors import raw
from runner.plan.build import resolutions
from runner.plan.phases import Plan
from runner.spec.schema import Spec
from runner.training.distributed import Ranks
from runner.training.model_pool import ModelPool

EVAL_SIGMAS = tuple(k / 10 for k in range(1, 10))


@dataclass(frozen=True)
class RunContext:
    """One run as its phases see it. What is computed from the fields is computed once.

    micro_batch_parts: parts that a micro-batch is cut into, where memory was too small for a whole one. fingerprints:
    of the base's parts, each computed once per run.
    """

    spec: Spec
    plan: Plan
    pictures: Pictures
    base: Base
    cache: Cache
    event_log: EventLog
    ranks: Ranks
    stop_requested: Callable[[], bool]
    micro_batch_parts: int = 1
    model_pool: ModelPool = field(default_factory=ModelPool)
    fingerprints: dict[str, str] = field(default_factory=dict)

    @cached_property
    def family(self) -> ModelFamily:
        return family_of(self.base)

    @property
    def encoders(self) -> Mapping[str, TextEncoder]:
        """The family's text encoders by name."""
        return self.family.architecture.encoders

    def part_fingerprint(self, part: str) -> str:
        """Of one of the base's folders."""
        if part not in self.fingerprints:
            self.fingerprints[part] = fingerprint(self.base.folder / part)
        return self.fingerprints[part]

    @property
    def base_fingerprint(self) -> str:
        return content_key("base", *map(self.part_fingerprint, PARTS_OF_BASE))

    @property
    def base_identity(self) -> BaseIdentity:
        name = self.spec.model.base
        commit = None if local_folder(name) else self.base.folder.name
        return BaseIdentity(name, commit, self.base_fingerprint)

    # ---- views: crops of pictures, which the VAE encodes -----------------------------------------------------------

    @cached_property
    def pictures_by_size(self) -> dict[Size, tuple[Picture, ...]]:
        """The training pictures by the size they are trained at; at several resolutions a picture is in several
        groups."""
        return self._group_by_size(self.pictures.items)

    def _group_by_size(self, pictures: Sequence[Picture]) -> dict[Size, tuple[Picture, ...]]:
        buckets = self.spec.data.buckets
        sizes = [images.measure(picture) if buckets else (1, 1) for picture in pictures]
        groups = group_by_bucket(sizes, resolutions(self.spec), buckets)
        return {size: tuple(pictures[index] for index in indices) for size, indices in groups.items()}

    @property
    def variants(self) -> int:
        assert self.spec.data.variants is not None  # the spec resolves it
        return self.spec.data.variants

    @cached_property
    def class_pictures(self) -> tuple[Picture, ...]:
        prior = self.spec.prior
        return class_images.class_pictures(Path(prior.images), prior.count, prior.prompt) if prior else ()

    @property
    def eval_points(self) -> tuple[tuple[CropView, tuple[float, ...]], ...]:
        """What the eval loss is averaged over, (view, sigmas) each: every held-out picture at every sigma.

        Where none is held out: every sigma once, spread over some training pictures. A validation should take no longer
        than a few steps, and the loss of training pictures says less anyway.
        """
        views = self.eval_views
        if self.pictures.held_out:
            return tuple((view, EVAL_SIGMAS) for view in views)
        return tuple((view, EVAL_SIGMAS[index :: len(views)]) for index, view in enumerate(views))

    @cached_property
    def eval_views(self) -> tuple[CropView, ...]:
        """The centre crops of the held-out pictures, or of some training pictures; each at its first size."""
        chosen = self.pictures.held_out or self.pictures.items[: len(EVAL_SIGMAS)]
        first_views: dict[str, CropView] = {}
        for size, pictures in self._group_by_size(chosen).items():
            for picture in pictures:
                first_views.setdefault(picture.name, CropView(picture, size, None))
        return tuple(first_views[picture.name] for picture in chosen)

    @cached_property
    def views(self) -> tuple[CropView, ...]:
        """All views that training and evaluation need, each once."""
        trained = [
            CropView(picture, size, variant)
            for size, pictures in self.pictures_by_size.items()
            for picture in pictures
            for variant in range(self.variants)
        ]
        classes = [CropView(picture, size, None) for size in self.pictures_by_size for picture in self.class_pictures]
        return tuple(dict.fromkeys([*trained, *classes, *self.eval_views]))

    @cached_property
    def latent_keys(self) -> dict[CropView, str]:
        """The cache key of each view. A key depends on the pixels, so it needs every picture decoded; the cache keeps a
        manifest of the keys, so a data set is decoded for them only once."""
        manifest = keys.views_key(
            self.spec, self.pictures.fingerprint, self.part_fingerprint("vae"), str(self.vae_base.dtype)
        )
        key_of = self.cache.read_manifest(manifest) if manifest else {}  # by the view's name
        class_pictures = set(self.class_pictures)
        data_views = [view for view in self.views if view.picture not in class_pictures]
        if any(_name(view) not in key_of for view in data_views):
            key_of = {_name(view): self._latent_key(pixels) for view, pixels in self.pixels(data_views)}
            if manifest:
                self.cache.write_manifest(manifest, key_of)
        class_views = [view for view in self.views if view.picture in class_pictures]
        class_keys = {view: self._latent_key(pixels) for view, pixels in self.pixels(class_views)}
        return {view: class_keys[view] if view in class_keys else key_of[_name(view)] for view in self.views}

    def pixels(self, views: Sequence[CropView]) -> Iterator[tuple[CropView, Any]]:
        """(view, pixels [height, width, 3] uint8) of each view, picture by picture. Every picture is decoded once, by
        `data.workers` threads."""
        data, seed = self.spec.data, self.spec.seed
        by_picture: dict[Picture, list[CropView]] = {}
        for view in views:
            by_picture.setdefault(view.picture, []).append(view)

        def crops_of(picture: Picture) -> list[tuple[CropView, Any]]:
            with images.one_large_at_a_time(picture):
                upright = images.decode(picture)
                return [
                    (view, images.cropped_pixels(
                        upright, picture.name, view.size, variant=view.variant, variants=self.variants,
                        center=data.center_crop, flip=data.random_flip, interpolation=data.interpolation, seed=seed,
                    ))
                    for view in by_picture[picture]
                ]  # fmt: skip

        pictures, workers = list(by_picture), max(1, data.workers)
        with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
            for start in range(0, len(pictures), 4 * workers):  # in parts, so that few pictures' pixels wait in memory
                for crops in pool.map(crops_of, pictures[start : start + 4 * workers]):
                    yield from crops

    @property
    def vae_base(self) -> Base:
        """The base as its VAE encodes: in fp32 instead of fp16, in which FLUX's overflows on some pictures (its config
        says `force_upcast`)."""
        return replace(self.base, dtype=torch.float32) if self.base.dtype == torch.float16 else self.base

    def _latent_key(self, pixels: Any) -> str:
        dtype = str(self.vae_base.dtype)
        return content_key("latents", pixels.tobytes(), json.dumps(pixels.shape), self.part_fingerprint("vae"), dtype)

    # ---- captions --------------------------------------------------------------------------------------------------

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Every caption and prompt that the run may read, as the user wrote it."""
        return keys.captions(self.spec, self.pictures)

    def entries(self, encoder: str, weights: Weights) -> dict[str, Entry]:
        """All embeddings that the run needs from an encoder, by their cache keys. weights: what was learned in the
        encoder."""
        key, asked = self.text_keys(encoder, weights), self.encoders[encoder]
        return {key(entry): entry for entry in keys.entries(self.spec, self.pictures, self.plan.placeholders, asked)}

    def text_key(self, encoder: str, caption: str, pooling: str, weights: Weights) -> str:
        """The cache key of one caption, given as the user wrote it. weights: what was learned in the encoder."""
        expanded = tokens.expand_placeholders(caption, self.plan.placeholders)
        return self.text_keys(encoder, weights)(keys.entry(self.spec, self.encoders[encoder], expanded, pooling))

    def text_keys(self, encoder: str, weights: Weights) -> Callable[[Entry], str]:
        """The function from an entry to its cache key. The digest of what was learned is computed once."""
        asked = self.encoders[encoder]
        text_lora = weights.text_lora if asked.lora_layers else {}
        learned = [weights.rows[encoder]] if encoder in weights.rows else []
        learned += [text_lora[name] for name in sorted(text_lora)]
        alpha = [self.spec.text_lora.alpha] if self.spec.text_lora and text_lora else []
        scale = [value for value in alpha if value is not None]
        quantization = [self.base.quantize] if asked.large and self.base.quantize != "none" else []
        fingerprints = {part: self.part_fingerprint(part) for part in asked.parts}
        digest, dtype = hashing.sha256([raw(tensor).data for tensor in learned]), str(self.base.dtype)
        return lambda entry: keys.text_key(asked, entry, fingerprints, dtype, digest, scale, quantization)

    @property
    def vocabulary_entries(self) -> list[str]:
        """The learned vocabulary entries of all placeholders, in the order of the token rows."""
        return tokens.vocabulary_entries(self.plan.placeholders)

    def check_stop(self) -> None:
        """Raises InterruptedRunError if a stop was requested."""
        if self.stop_requested():
            raise InterruptedRunError("stopped before training was complete; the same command goes on")


def _name(view: CropView) -> str:
    """As the cache's manifests name it."""
    width, height = view.size
    return f"{view.picture.name}|{width}x{height}|{view.variant}"


def open_base(spec: Spec, torch_device: torch.device, cache: Cache) -> Base:
    """The spec's base on a device, in the spec's dtype or the device's usual one. Raises what
    `runner.model.base.open_base` raises."""
    model, dtype = spec.model, device.resolve_dtype(spec.model.dtype, torch_device)
    return bases.open_base(
        model.base,
        model.revision,
        model.variant,
        torch_device,
        dtype,
        model.quantize,
        cache.folder,
        model.offload == "blocks",
    )


def open_cache(runs: Path) -> Cache:
    """The cache that all runs of a runs folder share."""
    return Cache(cache_folder(runs))
