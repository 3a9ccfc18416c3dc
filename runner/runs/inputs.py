"""What a run is trained on, file by file, so that a refusal can name what was changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from runner.base.files import file_digests, local_folder
from runner.core.humanize import list_some
from runner.data.images import Pictures
from runner.spec.schema import Spec

Digests = Mapping[str, str]


@dataclass(frozen=True)
class TrainingInputs:
    """By name inside the data set or the base: digests of the pictures ("" where only the whole set's is known), their
    captions, digests of the base's files. Empty for what only the hub has."""

    pictures: Digests = field(default_factory=dict)
    captions: Digests = field(default_factory=dict)
    base: Digests = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"pictures": dict(self.pictures), "captions": dict(self.captions), "base": dict(self.base)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> TrainingInputs | None:
        """From JSON; None where it says nothing of the kind."""
        parts = [found.get(name) for name in ("pictures", "captions", "base")]
        if not all(isinstance(part, dict) and all(isinstance(one, str) for one in part.values()) for part in parts):
            return None
        return cls(*(part for part in parts if part is not None))


def read_inputs(spec: Spec, pictures: Pictures | None) -> TrainingInputs:
    """As they are now. spec: with absolute paths."""
    folder = local_folder(spec.model.base)
    every = (*pictures.items, *pictures.held) if pictures else ()
    return TrainingInputs(
        {one.name: one.digest for one in every},
        {one.name: one.caption for one in every},
        file_digests(folder) if folder else {},
    )


def describe_changes(
    old: TrainingInputs, new: TrainingInputs, then: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
    """What is another now, in words, with the folder or id where that is another, too; nothing of what is not known on
    both sides. then, now: the specs by dotted key, for what is no part of a run's key."""
    data, base = [], []
    if old.pictures and new.pictures:
        data = [*_files("pictures", old.pictures, new.pictures), *_captions(old.captions, new.captions)]
    if old.base and new.base:
        base = list(_files("files of the base", old.base, new.base))
    for key, found in (("data.source", data), ("model.base", base)):
        unknown = key == "model.base" and not (old.base and new.base)
        if (found or unknown) and then.get(key) != now.get(key):
            found.append(f"{key}: {then.get(key)} -> {now.get(key)}")
    return [*data, *base]


def _files(what: str, old: Digests, new: Digests) -> Iterator[str]:
    for how, names in (
        ("added", new.keys() - old.keys()),
        ("removed", old.keys() - new.keys()),
        ("changed", {name for name in old.keys() & new.keys() if old[name] != new[name]}),
    ):
        if names:
            yield f"{what} {how}: {list_some(sorted(names))}"


def _captions(old: Digests, new: Digests) -> Iterator[str]:
    other = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    if other:
        first = f"{'the first: ' if len(other) > 1 else ''}{_short(old[other[0]])} -> {_short(new[other[0]])}"
        yield f"captions changed: {list_some(other)} ({first})"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
