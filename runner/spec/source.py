"""Where a spec's values were written: file, line and key, through `extends` and [sweep]."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.core.errors import Fault
from runner.spec.extends import Locations, location_of
from runner.spec.origins import DEFAULT
from runner.spec.tables import dotted_keys
from runner.spec.toml_lines import KeyPath


@dataclass(frozen=True)
class SpecOrigin:
    """Where a spec came from, so that later checks can name a line.

    locations: of its keys, in the file itself or in one that it extends; swept: the values that [sweep] set; set_keys:
    every dotted key that is in one of the files; origins: for the spec of a run folder, where it says that each value
    came from.
    """

    file: Path
    locations: Locations
    swept: Mapping[str, Any] = field(default_factory=dict)
    set_keys: frozenset[str] = frozenset()
    origins: Mapping[str, str] = field(default_factory=dict)

    def location(self, key: str) -> tuple[Path, int]:
        """File and line of a dotted key, or of what is nearest to it."""
        if key in self.swept:
            path: KeyPath = ("sweep", key) if ("sweep", key) in self.locations else ("sweep", *key.split("."))
        else:
            path = tuple(int(part) if part.isdigit() else part for part in key.split(".") if part)
        return location_of(self.locations, path) or (self.file, 1)

    def fault(self, key: str, message: str) -> Fault:
        """At the line of a dotted key."""
        return Fault(*self.location(key), key, self.relative(key, message))

    def relative(self, key: str, message: str) -> str:
        """A message about a key that holds a path, with paths relative to the key's file, as they are written there."""
        if key.partition(".")[0] not in ("data", "model", "prior"):
            return message
        folder = re.escape(str(self.location(key)[0].parent.resolve()))
        return re.sub(rf"(?<![\w/.-]){folder}/(?=[\w.])", "", message)

    def origin(self, key: str) -> str:
        """Where a resolved spec's value came from: "default", "set in FILE", "extended from FILE", "sweep in FILE"."""
        if swept := next((name for name, value in self.swept.items() if key in dotted_keys(value, name)), None):
            return f"sweep in {self.location(swept)[0]}"
        if key == "name" and self.swept:
            return f"sweep in {self.file}"
        if key in self.origins:
            return self.origins[key]
        if key not in self.set_keys:
            return DEFAULT
        file, _ = self.location(key)
        return f"set in {file}" if file == self.file else f"extended from {file}"
