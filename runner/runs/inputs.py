"""`inputs.json`: what a run is trained on, file by file, so that a refusal can name what was changed."""

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
    """By file name inside the data set or the base. pictures: digests, "" where only that of the whole set is known.
    captions: their text. base: digests. Empty for what only the hub has."""

    pictures: Digests = field(default_factory=dict)
    captions: Digests = field(default_factory=dict)
    base: Digests = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"pictures": dict(self.pictures), "captions": dict(self.captions), "base": dict(self.base)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TrainingInputs | None:
        """None where the JSON is something else."""
        tables = [content.get(name) for name in ("pictures", "captions", "base")]
        if not all(
            isinstance(table, dict) and all(isinstance(text, str) for text in table.values()) for table in tables
        ):
            return None
        return cls(*(table for table in tables if table is not None))


def read_inputs(spec: Spec, pictures: Pictures | None) -> TrainingInputs:
    """As they are now. spec: with absolute paths."""
    folder = local_folder(spec.model.base)
    all_pictures = (*pictures.items, *pictures.held_out) if pictures else ()
    return TrainingInputs(
        {picture.name: picture.digest for picture in all_pictures},
        {picture.name: picture.caption for picture in all_pictures},
        file_digests(folder) if folder else {},
    )


def describe_changes(
    old: TrainingInputs, new: TrainingInputs, old_spec: Mapping[str, Any], new_spec: Mapping[str, Any]
) -> list[str]:
    """What differs, in words. Nothing is said of what is not known on both sides.

    old_spec, new_spec: values by dotted key, to name the folder or the hub id where it differs as well; it is not part
    of a run's key.
    """
    data: list[str] = []
    base: list[str] = []
    if old.pictures and new.pictures:
        data = [*_file_changes("pictures", old.pictures, new.pictures), *_caption_changes(old.captions, new.captions)]
    base_is_known = bool(old.base and new.base)
    if base_is_known:
        base = list(_file_changes("files of the base", old.base, new.base))
    for key, changes, unknown in (("data.source", data, False), ("model.base", base, not base_is_known)):
        if (changes or unknown) and old_spec.get(key) != new_spec.get(key):
            changes.append(f"{key}: {old_spec.get(key)} -> {new_spec.get(key)}")
    return [*data, *base]


def _file_changes(what: str, old: Digests, new: Digests) -> Iterator[str]:
    for how, names in (
        ("added", new.keys() - old.keys()),
        ("removed", old.keys() - new.keys()),
        ("changed", {name for name in old.keys() & new.keys() if old[name] != new[name]}),
    ):
        if names:
            yield f"{what} {how}: {list_some(sorted(names))}"


def _caption_changes(old: Digests, new: Digests) -> Iterator[str]:
    changed = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    if changed:
        first = changed[0]
        example = f"{'the first: ' if len(changed) > 1 else ''}{_shown(old[first])} -> {_shown(new[first])}"
        yield f"captions changed: {list_some(changed)} ({example})"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
