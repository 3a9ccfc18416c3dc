"""Which samples a run draws, and their tags in trackers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

MAX_SLUG = 40  # characters of a prompt in a tag


def samples_of(prompts: Sequence[str], count: int, first_seed: int) -> list[tuple[str, int]]:
    """(prompt, seed) of every sample: `count` of each prompt, with consecutive seeds."""
    return [(prompt, first_seed + number) for prompt in prompts for number in range(count)]


def sample_tag(prompt: str, seed: int) -> str:
    """A sample's tag in trackers. Two runs have the same tag if and only if prompt and seed are the same.

    "a TOK on snow", 3 -> "samples/a-TOK-on-snow/3". A digest of the prompt is added where the words alone are
    ambiguous.
    """
    slug = re.sub(r"[^A-Za-z0-9]+", "-", prompt).strip("-")[:MAX_SLUG]
    if slug.replace("-", " ") != prompt:
        slug = f"{slug}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}".strip("-")
    return f"samples/{slug}/{seed}"
