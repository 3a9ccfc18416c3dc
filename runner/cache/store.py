"""The content-addressed cache: latents and text embeddings, shared by all runs of a runs folder.

The key is a hash of everything that goes in (pixels after the transform or the caption as the encoder reads it, the
encoder's identity, dtype), so a changed picture or caption is a new key and nothing stale can be served.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from runner.core import files
from runner.core.errors import BadFileError
from runner.core.files import read_json
from runner.model import tensors


class Cache:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def note(self, key: str) -> dict[str, str]:
        """What `put_note` wrote; {} where there is nothing, or nothing whole."""
        found = read_json(self._note(key))
        _asked_for(self._note(key))
        return found if all(isinstance(value, str) for value in found.values()) else {}

    def put_note(self, key: str, facts: Mapping[str, str]) -> None:
        """A few words that are a function of their key, e.g. which latents a data set comes to."""
        files.make_folder(self._note(key).parent, within=self.folder.parent)
        files.write_json(self._note(key), dict(facts))

    def _note(self, key: str) -> Path:
        return self.folder / "views" / key[:2] / f"{key}.json"

    def has(self, kind: str, key: str) -> bool:
        return self.path(kind, key).is_file()

    def get(self, kind: str, key: str) -> Tensor | None:
        """The entry, or None where there is none or it is damaged or another's (it can be made again; the bad file goes)."""
        path = self.path(kind, key)
        if not path.is_file():
            return None
        try:
            found, about = tensors.load(path)
            if (about.get("kind"), about.get("key", key)) != (kind, key):  # early entries do not know their key
                raise BadFileError(f"{path}: the header says {about.get('kind')} {about.get('key')}")
            _asked_for(path)
            return found["value"]
        except BadFileError:
            path.unlink(missing_ok=True)
            return None

    def read(self, kind: str, keys: Iterable[str], make: Callable[[], None]) -> dict[str, Tensor]:
        """All entries. Where some are not there, or not whole any more, `make` is asked once to make what is missing."""
        found = {key: self.get(kind, key) for key in dict.fromkeys(keys)}
        if any(value is None for value in found.values()):
            make()
            found |= {key: self.get(kind, key) for key, value in found.items() if value is None}
        there = {key: value for key, value in found.items() if value is not None}
        if len(there) < len(found):
            raise BadFileError(
                f"{self.folder / kind}: {len(found) - len(there)} entries are damaged right after they were made"
            )
        return there

    def put(self, kind: str, key: str, value: Tensor, about: Mapping[str, str]) -> None:
        path = self.path(kind, key)
        files.make_folder(path.parent, within=self.folder.parent)
        tensors.save(path, {"value": value}, {**about, "kind": kind, "key": key})


def _asked_for(path: Path) -> None:
    """For `fluxrun cache prune`."""
    with contextlib.suppress(
        OSError
    ):  # not there, another user's, or a disk that is only read: then it just looks older
        os.utime(path)
