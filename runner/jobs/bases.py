"""The base models that the specs of a queue name, each read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.base.files import (
    broken_configs,
    clip_config,
    fingerprint,
    local_folder,
    transformer_config,
)
from runner.core.hashing import content_key
from runner.spec.schema import Spec


@dataclass(frozen=True)
class OpenedBase:
    """What a base model's files say. faults: (key, message) each; where there are any, nothing else was read."""

    fingerprint: str
    config: Mapping[str, Any] | None
    clip: Mapping[str, Any] | None
    faults: list[tuple[str, str]]


class BaseRegistry:
    """The bases of one command's runs, each read once."""

    def __init__(self) -> None:
        self._read: dict[tuple[str | None, ...], OpenedBase] = {}

    def of(self, spec: Spec) -> OpenedBase:
        own = spec.model
        asked = (own.base, own.revision, own.variant)
        if asked not in self._read:
            self._read[asked] = _read_base(*asked)
        return self._read[asked]


def _read_base(base: str, revision: str | None, variant: str | None) -> OpenedBase:
    folder = local_folder(base)
    if folder is None:
        return OpenedBase(content_key("hub", base, revision, variant), transformer_config(base, None), None, [])
    if broken := [("model.base", message) for message in broken_configs(folder)]:
        return OpenedBase("", None, None, broken)
    return OpenedBase(fingerprint(folder), transformer_config(base, folder), clip_config(folder), [])
