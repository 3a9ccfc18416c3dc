"""New tokens in captions: which placeholder stands for which learned vectors. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Placeholder:
    """One concept: the word written in captions, and the vocabulary entries that stand for it ("<s0>", "<s1>")."""

    name: str
    pieces: tuple[str, ...]
    initializer: str | None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def placeholders(tokens: Sequence[tuple[str, int, str | None]]) -> tuple[Placeholder, ...]:
    """(name, vectors, initializer) each -> consecutive entries over all tokens, in the order given."""
    out: list[Placeholder] = []
    start = 0
    for name, vectors, initializer in tokens:
        out.append(Placeholder(name, tuple(f"<s{start + i}>" for i in range(vectors)), initializer))
        start += vectors
    return tuple(out)


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(r"(?<![A-Za-z0-9_])(" + "|".join(map(re.escape, longest_first)) + r")(?![A-Za-z0-9_])")


def named(caption: str, known: Sequence[Placeholder]) -> set[str]:
    """The names of the tokens that a caption contains, as whole words: TOK is not in TOK2 or TOKYO."""
    return set(_pattern([p.name for p in known]).findall(caption)) if known else set()


def expand(caption: str, known: Sequence[Placeholder]) -> str:
    """Replace every token's name by its vocabulary entries: "a TOK" -> "a <s0><s1>"."""
    if not known:
        return caption
    text = {p.name: p.text for p in known}
    return _pattern(list(text)).sub(lambda match: text[match.group(1)], caption)
