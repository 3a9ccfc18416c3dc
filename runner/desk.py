"""What the phases of one run share: what was asked, what it is about, where it happens; and the keys of its cache entries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from runner import data, files, flux, tokens
from runner.basefiles import fingerprint
from runner.cache import Cache
from runner.data import Pictures
from runner.digest import key_of
from runner.errors import Interrupted
from runner.plan import Plan
from runner.say import Say
from runner.spec import Spec
from runner.tensors import raw

PARTS = {"clip": ("text_encoder", "tokenizer"), "t5": ("text_encoder_2", "tokenizer_2")}


@dataclass(frozen=True)
class Desk:
    spec: Spec
    plan: Plan
    pictures: Pictures
    base: flux.Base
    cache: Cache
    say: Say
    stop_requested: Callable[[], bool]
    prints: dict[str, str] = field(default_factory=dict)  # fingerprints of the base's parts, once per run

    def part_print(self, part: str) -> str:
        if part not in self.prints:
            self.prints[part] = fingerprint(self.base.folder / part)
        return self.prints[part]

    @property
    def size(self) -> int:
        assert isinstance(self.spec.data.resolution, int)  # the planner refuses lists
        return self.spec.data.resolution

    @cached_property
    def latent_keys(self) -> list[str]:
        """One key per picture; decodes every picture, so it is kept for the whole run."""
        return [self.latent_key(pixels) for pixels in self.all_pixels()]

    def all_pixels(self) -> Iterator[Any]:
        """Each picture's pixels, in order, decoded by `data.workers` threads."""
        own = self.spec.data

        def decode(picture: data.Picture) -> Any:
            return data.pixels(
                picture.open(), picture.name, self.size,
                center=own.center_crop, flip=own.random_flip, interpolation=own.interpolation, seed=self.spec.seed,
            )  # fmt: skip

        with ThreadPoolExecutor(max(1, own.workers)) as pool:
            yield from pool.map(decode, self.pictures.items)

    def latent_key(self, pixels: Any) -> str:
        return key_of(
            "latents", pixels.tobytes(), json.dumps(pixels.shape), self.part_print("vae"), str(self.base.dtype)
        )

    def text_key(self, encoder: str, caption: str, rows: Tensor | None) -> str:
        """`caption` as written; `rows` are the encoder's learned ones, None where it has none."""
        length = self.spec.model.max_sequence_length if encoder == "t5" else 77
        learned = "" if rows is None else files.sha256([raw(rows).data])
        model = [self.part_print(part) for part in PARTS[encoder]]
        return key_of(
            encoder, tokens.expand(caption, self.plan.placeholders), learned, *model, length, str(self.base.dtype)
        )

    @property
    def pieces(self) -> list[str]:
        return [piece for placeholder in self.plan.placeholders for piece in placeholder.pieces]

    def check_stop(self) -> None:
        if self.stop_requested():
            raise Interrupted("stopped before training was complete; the same command goes on")
