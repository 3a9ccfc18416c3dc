"""Where a spec's values were written: file, line and key, through `extends` and `[sweep]`."""

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
    """Where a spec came from, so that later checks can point at a line. `places`: of its keys, in the file itself or in
    one that it extends; `swept`: what [sweep] set; `written`: every dotted key that stands somewhere; `origins`: of a run
    folder's own spec, what it says of where each value came from."""

    file: Path
    places: Locations
    swept: Mapping[str, Any] = field(default_factory=dict)
    written: frozenset[str] = frozenset()
    origins: Mapping[str, str] = field(default_factory=dict)

    def place(self, key: str) -> tuple[Path, int]:
        if key in self.swept:
            path: KeyPath = ("sweep", key) if ("sweep", key) in self.places else ("sweep", *key.split("."))
        else:
            path = tuple(int(part) if part.isdigit() else part for part in key.split(".") if part)
        return location_of(self.places, path) or (self.file, 1)

    def fault(self, key: str, message: str) -> Fault:
        return Fault(*self.place(key), key, self.relative(key, message))

    def relative(self, key: str, message: str) -> str:
        """A message about a key that holds a path, with paths as they could stand there."""
        if key.partition(".")[0] not in ("data", "model", "prior"):
            return message
        folder = re.escape(str(self.place(key)[0].parent.resolve()))
        return re.sub(rf"(?<![\w/.-]){folder}/(?=[\w.])", "", message)

    def origin(self, key: str) -> str:
        """Where a resolved spec's value came from, in words."""
        if swept := next((one for one, value in self.swept.items() if key in dotted_keys(value, one)), None):
            return f"sweep in {self.place(swept)[0]}"
        if key == "name" and self.swept:
            return f"sweep in {self.file}"
        if key in self.origins:
            return self.origins[key]
        if key not in self.written:
            return DEFAULT
        file, _ = self.place(key)
        return f"set in {file}" if file == self.file else f"extended from {file}"
