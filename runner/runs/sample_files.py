"""Which sample pictures a run draws, and under which name runs' pictures are compared."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

LONGEST = 40  # characters of a prompt in a tag


def samples_of(prompts: Sequence[str], count: int, first: int) -> list[tuple[str, int]]:
    """(prompt, seed) of every picture: `count` of each prompt, with seeds counting up from `first`."""
    return [(prompt, first + number) for prompt in prompts for number in range(count)]


def sample_tag(prompt: str, seed: int) -> str:
    """The tag of a picture in trackers: equal in all runs for the same prompt and seed, and only then.

    "a TOK on snow", 3 -> "samples/a-TOK-on-snow/3"; where the words alone would not tell it from another prompt, a digest
    follows them.
    """
    slug = re.sub(r"[^A-Za-z0-9]+", "-", prompt).strip("-")[:LONGEST]
    if slug.replace("-", " ") != prompt:
        slug = f"{slug}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}".strip("-")
    return f"samples/{slug}/{seed}"
