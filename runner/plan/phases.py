"""What will happen: a Spec and the facts it names become Phases. Pure; no file is touched and no torch imported."""

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
    """What a plan must know of the world. Unknown (None) for what only the hub can tell.

    `captions`: distinct; `images`: how many there are; `sizes`: theirs, measured only where buckets ask for it;
    `data`, `base`: fingerprints; `config`, `clip`: the transformer's and the CLIP encoder's.
    """

    captions: tuple[str, ...] | None
    images: int | None
    data: str
    base: str
    config: Mapping[str, Any] | None
    clip: Mapping[str, Any] | None = None
    sizes: tuple[Size, ...] | None = None


@dataclass(frozen=True)
class Prior:
    """Class images by the base into their shared folder, until there are `count`."""

    name: str
    at: int
    count: int
    key: str


@dataclass(frozen=True)
class Encode:
    """Text embeddings and latents into the cache. `encoders`: those that read some caption here."""

    name: str
    at: int
    encoders: tuple[str, ...]
    latents: bool
    key: str


@dataclass(frozen=True)
class Part:
    """Something that learns. what: "token rows", "text lora" or "lora"; encoders: whose; parameters: if known."""

    what: str
    encoders: tuple[str, ...]
    parameters: int | None


@dataclass(frozen=True)
class TrainPhase:
    """Training from step `start` to step `stop` of what `trains` lists.

    kind: "joint" is the transformer's LoRA together with token rows or with the CLIP encoder's LoRA. "inversion" is token
    rows alone; a LoRA that has stopped learning stays in place. "lora" is one LoRA alone: the transformer's, with every
    caption encoded beforehand, or the CLIP encoder's.
    """

    kind: Literal["joint", "inversion", "lora"]
    name: str
    start: int
    stop: int
    trains: tuple[Part, ...]
    key: str


@dataclass(frozen=True)
class Export:
    """`encoders`: those that are loaded for it; what T5 reads without having learned anything is in the cache."""

    name: str
    at: int
    pictures: int
    encoders: tuple[str, ...]
    key: str


Phase = Prior | Encode | TrainPhase | Export


def learned_parts(phase: Phase, what: str) -> tuple[str, ...]:
    """The encoders whose `what` learns in this phase."""
    parts = phase.trains if isinstance(phase, TrainPhase) else ()
    return tuple(encoder for part in parts if part.what == what for encoder in part.encoders)


def recomputed(spec: Spec, *, rows: bool) -> int | Literal["selective"]:
    """The activations of every so many blocks (0: of none) are made again in the backward pass, or some of all blocks. rows:
    while token rows learn."""
    own = spec.inversion.gradient_checkpointing if rows else None
    own = spec.model.gradient_checkpointing if own is None else own
    return own if own == "selective" else int(own)


def trains_lora(phase: Phase) -> bool:
    return isinstance(phase, TrainPhase) and any(part.what == "lora" for part in phase.trains)


@dataclass(frozen=True)
class Plan:
    """`steps` is where the run ends: sooner than asked when nothing is left to train. `notes` say such things.

    `sizes`: how many views are trained at each size; `texts`: how many different ones a batch can have. None where that is
    not known before the images are here.
    `disk_bytes`: about what the run folder will hold at most (`runner.plan.disk`).
    """

    name: str
    steps: int
    phases: tuple[Phase, ...]
    placeholders: tuple[tokens.Placeholder, ...]
    notes: tuple[str, ...]
    sizes: Mapping[Size, int] | None
    texts: int | None
    disk_bytes: int

    @property
    def key(self) -> str:
        return self.phases[-1].key

    @property
    def training_key(self) -> str:
        """Of the trained weights, whatever is shown and exported of them."""
        last = self.training[-1]
        return content_key(last.key, last.stop)

    @property
    def training(self) -> tuple[TrainPhase, ...]:
        return tuple(phase for phase in self.phases if isinstance(phase, TrainPhase))
