"""The types of a plan: the facts it is made from, its phases, and the plan itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runner.core.hashing import content_key
from runner.data import tokens
from runner.data.buckets import Size
from runner.spec.schema import Spec


@dataclass(frozen=True)
class Facts:
    """What a plan must know besides the spec. None: only the hub can tell.

    captions: the distinct ones of the training images. image_count: of all images, held-out ones included. sizes: of
    the training images, measured only where buckets need them. transformer, clip: configs of the base's parts.
    """

    captions: tuple[str, ...] | None
    image_count: int | None
    data_fingerprint: str
    base_fingerprint: str
    transformer: Mapping[str, Any] | None
    clip: Mapping[str, Any] | None = None
    sizes: tuple[Size, ...] | None = None


@dataclass(frozen=True)
class Prior:
    """Class images are generated with the base until their folder holds `count`."""

    name: str
    at: int
    count: int
    key: str


@dataclass(frozen=True)
class Encode:
    """Text embeddings and latents are written into the cache. encoders: those that have texts to read here."""

    name: str
    at: int
    encoders: tuple[str, ...]
    latents: bool
    key: str


@dataclass(frozen=True)
class Part:
    """Parameters that are trained together. encoders: the text encoders they belong to. parameters: how many, if
    known."""

    what: Literal["token rows", "text lora", "lora"]
    encoders: tuple[str, ...]
    parameters: int | None


@dataclass(frozen=True)
class TrainPhase:
    """Training of the parts in `trains` from step `start` to step `stop`.

    kind: "joint" is the transformer's LoRA together with token rows or with the CLIP encoder's LoRA. "inversion" is
    token rows alone; a LoRA that is no longer trained stays in place. "lora" is one LoRA alone: the transformer's, with
    every caption encoded beforehand, or the CLIP encoder's.
    """

    kind: Literal["joint", "inversion", "lora"]
    name: str
    start: int
    stop: int
    trains: tuple[Part, ...]
    key: str


@dataclass(frozen=True)
class Export:
    """The exports are written and the sample images drawn. encoders: those that are loaded for the samples; the
    embeddings of T5 without learned tokens come from the cache."""

    name: str
    at: int
    pictures: int
    encoders: tuple[str, ...]
    key: str


Phase = Prior | Encode | TrainPhase | Export


def trained_encoders(phase: Phase, what: str) -> tuple[str, ...]:
    """The text encoders in which a phase trains "token rows" or a "text lora"."""
    parts = phase.trains if isinstance(phase, TrainPhase) else ()
    return tuple(encoder for part in parts if part.what == what for encoder in part.encoders)


def trains_lora(phase: Phase) -> bool:
    """Whether a phase trains the transformer's LoRA."""
    return isinstance(phase, TrainPhase) and any(part.what == "lora" for part in phase.trains)


def gradient_checkpointing(spec: Spec, *, token_rows: bool) -> int | Literal["selective"]:
    """n: the activations of every n-th block are recomputed in the backward pass (0: of none). "selective": some
    activations of every block. token_rows: whether the phase trains them, for which the spec may say otherwise."""
    chosen = spec.inversion.gradient_checkpointing if token_rows else None
    chosen = spec.model.gradient_checkpointing if chosen is None else chosen
    return chosen if chosen == "selective" else int(chosen)


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    steps: where the run ends, which is before `train.steps` if nothing is left to train; `notes` say so. sizes: how
    many views (an image at one of the resolutions) are trained at each size. distinct_texts: how many different
    captions and prompts a batch can hold. Both are None until a hub data set is on this disk. disk_bytes: what the run
    folder will hold at most.
    """

    name: str
    steps: int
    phases: tuple[Phase, ...]
    placeholders: tuple[tokens.Placeholder, ...]
    notes: tuple[str, ...]
    sizes: Mapping[Size, int] | None
    distinct_texts: int | None
    disk_bytes: int

    @property
    def key(self) -> str:
        """Of everything that the run makes."""
        return self.phases[-1].key

    @property
    def training_key(self) -> str:
        """Of the trained weights alone, without samples and exports."""
        last = self.training[-1]
        return content_key(last.key, last.stop)

    @property
    def training(self) -> tuple[TrainPhase, ...]:
        return tuple(phase for phase in self.phases if isinstance(phase, TrainPhase))
