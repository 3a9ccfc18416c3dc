"""New tokens in captions: which placeholder stands for which learned vectors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Placeholder:
    """One concept: the word written in captions, and the vocabulary entries that stand for it ("<s0>", "<s1>")."""

    name: str
    entries: tuple[str, ...]
    initializer: str | None

    @property
    def text(self) -> str:
        return "".join(self.entries)


PLACEHOLDER = "s"


class Token(Protocol):
    """A [[tokens]] table of a spec."""

    @property
    def name(self) -> str: ...
    @property
    def vectors(self) -> int: ...
    @property
    def initializer(self) -> str | None: ...
    @property
    def placeholder(self) -> str | None: ...


def placeholders(tokens: Sequence[Token]) -> tuple[Placeholder, ...]:
    """The vocabulary entries of each token, in the order given: its placeholder with a number, <bird0><bird1>. Tokens
    without a placeholder of their own share `s`, and count on: <s0><s1>, <s2><s3>."""
    out: list[Placeholder] = []
    used: dict[str, int] = {}
    for token in tokens:
        word = token.placeholder or PLACEHOLDER
        start = used.get(word, 0)
        used[word] = start + token.vectors
        out.append(
            Placeholder(token.name, tuple(f"<{word}{start + i}>" for i in range(token.vectors)), token.initializer)
        )
    return tuple(out)


def vocabulary_entries(placeholders: Iterable[Placeholder]) -> list[str]:
    """Those of all placeholders, in order: the order of the rows in every file and tensor of learned embeddings."""
    return [entry for placeholder in placeholders for entry in placeholder.entries]


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(r"(?<![A-Za-z0-9_])(" + "|".join(map(re.escape, longest_first)) + r")(?![A-Za-z0-9_])")


def tokens_in_caption(caption: str, placeholders: Sequence[Placeholder]) -> set[str]:
    """The names of the tokens that a caption contains, as whole words: TOK is not in TOK2 or TOKYO."""
    return set(_pattern([p.name for p in placeholders]).findall(caption)) if placeholders else set()


def expand_placeholders(caption: str, placeholders: Sequence[Placeholder]) -> str:
    """Replace every token's name by its vocabulary entries: "a TOK" -> "a <s0><s1>"."""
    if not placeholders:
        return caption
    text = {p.name: p.text for p in placeholders}
    return _pattern(list(text)).sub(lambda match: text[match.group(1)], caption)
