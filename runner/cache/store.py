"""The content-addressed cache of latents and text embeddings, shared by all runs of a runs folder.

A key is a hash of everything that an entry depends on: the transformed pixels, or the caption as the encoder reads it;
the encoder's fingerprint; the dtype. A changed picture or caption has another key, so an entry is never stale.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from runner.cache.paths import entry_file, manifest_file
from runner.core import files
from runner.core.errors import BadFileError
from runner.core.files import read_json
from runner.model import tensors


class Cache:
    """The entries in a folder, one safetensors file each, by kind ("latents", or an encoder's name) and key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: str) -> Path:
        return entry_file(self.folder, kind, key)

    def read_manifest(self, key: str) -> dict[str, str]:
        """What `write_manifest` wrote; {} if there is nothing, or it is damaged."""
        facts = read_json(self._manifest(key))
        _mark_used(self._manifest(key))
        return facts if all(isinstance(value, str) for value in facts.values()) else {}

    def write_manifest(self, key: str, facts: Mapping[str, str]) -> None:
        """Keep a few strings that depend on the key alone, such as the keys of a data set's latents."""
        files.make_folder(self._manifest(key).parent, within=self.folder.parent)
        files.write_json(self._manifest(key), dict(facts))

    def _manifest(self, key: str) -> Path:
        return manifest_file(self.folder, key)

    def has(self, kind: str, key: str) -> bool:
        return self.path(kind, key).is_file()

    def get(self, kind: str, key: str) -> Tensor | None:
        """The entry, or None if there is none. A damaged or misnamed file is removed, since it can be made again."""
        path = self.path(kind, key)
        if not path.is_file():
            return None
        try:
            loaded, about = tensors.load(path)
            if (about.get("kind"), about.get("key", key)) != (kind, key):  # entries of early versions have no key
                raise BadFileError(f"{path}: the header says {about.get('kind')} {about.get('key')}")
            _mark_used(path)
            return loaded["value"]
        except BadFileError:
            path.unlink(missing_ok=True)
            return None

    def read(self, kind: str, keys: Iterable[str], make: Callable[[], None]) -> dict[str, Tensor]:
        """All entries, by key. If some are missing or damaged, `make` is called once and must put them.

        Raises BadFileError if some are missing even then.
        """
        values = {key: self.get(kind, key) for key in dict.fromkeys(keys)}
        if any(value is None for value in values.values()):
            make()
            values |= {key: self.get(kind, key) for key, value in values.items() if value is None}
        entries = {key: value for key, value in values.items() if value is not None}
        if len(entries) < len(values):
            raise BadFileError(
                f"{self.folder / kind}: {len(values) - len(entries)} entries are damaged right after they were made"
            )
        return entries

    def put(self, kind: str, key: str, value: Tensor, about: Mapping[str, str]) -> None:
        """Write an entry. about: strings for its header. Raises OSError."""
        path = self.path(kind, key)
        files.make_folder(path.parent, within=self.folder.parent)
        tensors.save(path, {"value": value}, {**about, "kind": kind, "key": key})


def _mark_used(path: Path) -> None:
    """Set the file's time, by which `fluxrun cache prune` chooses what to remove."""
    with contextlib.suppress(
        OSError
    ):  # a missing file, another user's or a read-only disk: it then looks older than it is
        os.utime(path)
