"""Learned tokens in captions: each token's name stands for entries of the text encoders' vocabularies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

DEFAULT_WORD = "s"


@dataclass(frozen=True)
class Placeholder:
    """One concept. name: the word in captions ("TOK"); entries: the vocabulary entries that replace it ("<s0>",
    "<s1>"), one for each learned vector; initializer: a phrase whose embeddings they start from."""

    name: str
    entries: tuple[str, ...]
    initializer: str | None

    @property
    def text(self) -> str:
        return "".join(self.entries)


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
    """One for each token, in the same order.

    The vocabulary entries are the token's `placeholder` with a number: <bird0><bird1>. Tokens without one share `s` and
    are numbered together: <s0><s1> for the first, <s2><s3> for the second.
    """
    result: list[Placeholder] = []
    used: dict[str, int] = {}
    for token in tokens:
        word = token.placeholder or DEFAULT_WORD
        first = used.get(word, 0)
        used[word] = first + token.vectors
        entries = tuple(f"<{word}{number}>" for number in range(first, first + token.vectors))
        result.append(Placeholder(token.name, entries, token.initializer))
    return tuple(result)


def vocabulary_entries(placeholders: Iterable[Placeholder]) -> list[str]:
    """Those of all placeholders, in order: the order of the rows in every file and tensor of learned embeddings."""
    return [entry for placeholder in placeholders for entry in placeholder.entries]


def tokens_in_caption(caption: str, placeholders: Sequence[Placeholder]) -> set[str]:
    """The names of the tokens in a caption, as whole words: TOK is not in TOK2 or TOKYO."""
    return set(_pattern([p.name for p in placeholders]).findall(caption)) if placeholders else set()


def expand_placeholders(caption: str, placeholders: Sequence[Placeholder]) -> str:
    """The caption with vocabulary entries in place of each token's name: "a TOK" -> "a <s0><s1>"."""
    if not placeholders:
        return caption
    texts = {p.name: p.text for p in placeholders}
    return _pattern(list(texts)).sub(lambda match: texts[match.group(1)], caption)


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(r"(?<![A-Za-z0-9_])(" + "|".join(map(re.escape, longest_first)) + r")(?![A-Za-z0-9_])")
