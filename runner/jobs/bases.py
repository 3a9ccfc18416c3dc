"""The base models that the specs of one command name, each read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.base.files import broken_configs, clip_config, fingerprint, local_folder, transformer_config
from runner.core.hashing import content_key
from runner.plan.faults import KeyMessage
from runner.spec.schema import Spec


@dataclass(frozen=True)
class OpenedBase:
    """What the files of a base model tell. faults: (key, message) each; where there are any, nothing else was read.
    config, clip: of the transformer and the CLIP encoder; None for a hub base that is not known."""

    fingerprint: str
    config: Mapping[str, Any] | None
    clip: Mapping[str, Any] | None
    faults: list[KeyMessage]


class BaseRegistry:
    """The bases of one command's runs."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, str | None, str | None], OpenedBase] = {}

    def of(self, spec: Spec) -> OpenedBase:
        model = spec.model
        key = (model.base, model.revision, model.variant)
        if key not in self._opened:
            self._opened[key] = _open_base(*key)
        return self._opened[key]


def _open_base(base: str, revision: str | None, variant: str | None) -> OpenedBase:
    folder = local_folder(base)
    if folder is None:
        return OpenedBase(content_key("hub", base, revision, variant), transformer_config(base, None), None, [])
    if faults := [("model.base", message) for message in broken_configs(folder)]:
        return OpenedBase("", None, None, faults)
    return OpenedBase(fingerprint(folder), transformer_config(base, folder), clip_config(folder), [])
