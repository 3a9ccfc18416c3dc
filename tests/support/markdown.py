"""The code blocks of a page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, kind: str) -> list[Block]:
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    text = page.read_text()
    return [Block(page, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in fences if m[1] == kind]
