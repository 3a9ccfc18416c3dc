"""What the phases of one run share: what was asked, what it is about, where it happens; and the keys of its cache entries."""

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
    spec: Spec
    plan: Plan
    pictures: Pictures
    base: Base
    cache: Cache
    event_log: EventLog
    ranks: Ranks
    stop_requested: Callable[[], bool]
    split: int = 1  # parts that a micro-batch is cut into, where the memory was too small for it whole
    model_pool: ModelPool = field(default_factory=ModelPool)
    prints: dict[str, str] = field(default_factory=dict)  # fingerprints of the base's parts, once per run

    @cached_property
    def family(self) -> ModelFamily:
        return family_of(self.base)

    @property
    def encoders(self) -> Mapping[str, TextEncoder]:
        """The family's text encoders by name."""
        return self.family.architecture.encoders

    def part_print(self, part: str) -> str:
        if part not in self.prints:
            self.prints[part] = fingerprint(self.base.folder / part)
        return self.prints[part]

    @property
    def base_print(self) -> str:
        return content_key("base", *map(self.part_print, PARTS_OF_BASE))

    @property
    def base_identity(self) -> BaseIdentity:
        own = self.spec.model
        commit = None if local_folder(own.base) else self.base.folder.name
        return BaseIdentity(own.base, commit, self.base_print)

    # ---- views: what goes through the VAE --------------------------------------------------------------------------

    @cached_property
    def groups(self) -> dict[Size, tuple[Picture, ...]]:
        """The training pictures by the size they are trained at."""
        return self._grouped(self.pictures.items)

    def _grouped(self, pictures: Sequence[Picture]) -> dict[Size, tuple[Picture, ...]]:
        buckets = self.spec.data.buckets
        sizes = [images.measure(picture) if buckets else (1, 1) for picture in pictures]
        found = group_by_bucket(sizes, resolutions(self.spec), buckets)
        return {size: tuple(pictures[index] for index in chosen) for size, chosen in found.items()}

    @property
    def variants(self) -> int:
        assert self.spec.data.variants is not None  # the spec resolves it
        return self.spec.data.variants

    @cached_property
    def class_pictures(self) -> tuple[Picture, ...]:
        own = self.spec.prior
        return class_images.pictures(Path(own.images), own.count, own.prompt) if own else ()

    @property
    def eval_points(self) -> tuple[tuple[CropView, tuple[float, ...]], ...]:
        """What the eval loss is taken at: every held-out picture at every sigma. Where none is held out, every sigma once,
        each at another of the training pictures: a look shall cost a few steps, and tells less there anyway."""
        views = self.eval_views
        if self.pictures.held:
            return tuple((view, EVAL_SIGMAS) for view in views)
        return tuple((view, EVAL_SIGMAS[at :: len(views)]) for at, view in enumerate(views))

    @cached_property
    def eval_views(self) -> tuple[CropView, ...]:
        """The held-out pictures, or some training ones: their middles, at each one's first size."""
        chosen = self.pictures.held or self.pictures.items[: len(EVAL_SIGMAS)]
        first: dict[str, CropView] = {}
        for size, pictures in self._grouped(chosen).items():
            for picture in pictures:
                first.setdefault(picture.name, CropView(picture, size, None))
        return tuple(first[picture.name] for picture in chosen)

    @cached_property
    def views(self) -> tuple[CropView, ...]:
        """Everything that training and evaluation look at."""
        trained = [
            CropView(picture, size, variant)
            for size, pictures in self.groups.items()
            for picture in pictures
            for variant in range(self.variants)
        ]
        classes = [CropView(picture, size, None) for size in self.groups for picture in self.class_pictures]
        return tuple(dict.fromkeys([*trained, *classes, *self.eval_views]))

    @cached_property
    def latent_keys(self) -> dict[CropView, str]:
        """A key is of the pixels, so every picture must be decoded for it; the cache remembers what that came to."""
        note = keys.views_key(self.spec, self.pictures.fingerprint, self.part_print("vae"), str(self.vae_base.dtype))
        known = self.cache.note(note) if note else {}
        made_here = set(self.class_pictures)
        own = [view for view in self.views if view.picture not in made_here]
        if any(_name(view) not in known for view in own):
            known = {_name(view): self._latent_key(pixels) for view, pixels in self.pixels(own)}
            if note:
                self.cache.put_note(note, known)
        classes = [view for view in self.views if view.picture in made_here]
        drawn = {view: self._latent_key(pixels) for view, pixels in self.pixels(classes)}
        return {view: drawn[view] if view in drawn else known[_name(view)] for view in self.views}

    def pixels(self, views: Sequence[CropView]) -> Iterator[tuple[CropView, Any]]:
        """Each view's pixels; every picture is decoded once, by `data.workers` threads."""
        own, seed = self.spec.data, self.spec.seed
        by_picture: dict[Picture, list[CropView]] = {}
        for view in views:
            by_picture.setdefault(view.picture, []).append(view)

        def cut(picture: Picture) -> list[tuple[CropView, Any]]:
            with images.in_turn(picture):
                upright = images.decode(picture)
                return [
                    (view, images.pixels(
                        upright, picture.name, view.size, variant=view.variant, variants=self.variants,
                        center=own.center_crop, flip=own.random_flip, interpolation=own.interpolation, seed=seed,
                    ))
                    for view in by_picture[picture]
                ]  # fmt: skip

        pictures, part = list(by_picture), 4 * max(1, own.workers)
        with ThreadPoolExecutor(max(1, own.workers), thread_name_prefix="decode") as pool:
            for start in range(0, len(pictures), part):  # in parts, so that few pictures' pixels wait in memory
                for cuts in pool.map(cut, pictures[start : start + part]):
                    yield from cuts

    @property
    def vae_base(self) -> Base:
        """The base as its VAE encodes: in fp32 instead of fp16, in which FLUX's overflows on some pictures (its config says
        `force_upcast`)."""
        return replace(self.base, dtype=torch.float32) if self.base.dtype == torch.float16 else self.base

    def _latent_key(self, pixels: Any) -> str:
        dtype = str(self.vae_base.dtype)
        return content_key("latents", pixels.tobytes(), json.dumps(pixels.shape), self.part_print("vae"), dtype)

    # ---- captions --------------------------------------------------------------------------------------------------

    @cached_property
    def captions(self) -> tuple[str, ...]:
        return keys.captions(self.spec, self.pictures)

    def entries(self, encoder: str, weights: Weights) -> dict[str, Entry]:
        """All that `encoder` has to read, by the keys of the cache; the encoder as `weights` have changed it."""
        key, asked = self.text_keys(encoder, weights), self.encoders[encoder]
        return {key(entry): entry for entry in keys.entries(self.spec, self.pictures, self.plan.placeholders, asked)}

    def text_key(self, encoder: str, caption: str, pooling: str, weights: Weights) -> str:
        """`caption` as written; the encoder as `weights` have changed it."""
        written = tokens.expand_placeholders(caption, self.plan.placeholders)
        return self.text_keys(encoder, weights)(keys.entry(self.spec, self.encoders[encoder], written, pooling))

    def text_keys(self, encoder: str, weights: Weights) -> Callable[[Entry], str]:
        """The cache's key of an entry. The digest of what was learned is computed once for all of them."""
        asked = self.encoders[encoder]
        text_lora = weights.text_lora if asked.lora_layers else {}
        learned = [weights.rows[encoder]] if encoder in weights.rows else []
        learned += [text_lora[name] for name in sorted(text_lora)]
        alpha = [self.spec.text_lora.alpha] if self.spec.text_lora and text_lora else []
        scale = [value for value in alpha if value is not None]
        quantization = [self.base.quantize] if asked.large and self.base.quantize != "none" else []
        prints = {part: self.part_print(part) for part in asked.parts}
        digest, dtype = hashing.sha256([raw(tensor).data for tensor in learned]), str(self.base.dtype)
        return lambda entry: keys.text_key(asked, entry, prints, dtype, digest, scale, quantization)

    @property
    def pieces(self) -> list[str]:
        return tokens.vocabulary_entries(self.plan.placeholders)

    def check_stop(self) -> None:
        if self.stop_requested():
            raise InterruptedRunError("stopped before training was complete; the same command goes on")


def _name(view: CropView) -> str:
    width, height = view.size
    return f"{view.picture.name}|{width}x{height}|{view.variant}"


def open_base(spec: Spec, where: torch.device, cache: Cache) -> Base:
    """The spec's base on a device, in the spec's dtype or the device's usual one. Raises what `runner.model.base.open_base`
    raises."""
    model, dtype = spec.model, device.resolve_dtype(spec.model.dtype, where)
    return bases.open_base(
        model.base, model.revision, model.variant, where, dtype, model.quantize, cache.folder, model.offload == "blocks"
    )


def open_cache(runs: Path) -> Cache:
    return Cache(cache_folder(runs))
