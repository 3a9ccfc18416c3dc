"""Seeds for random draws. Every draw is a function of its arguments, so a resumed run has no generator state to
restore."""

from __future__ import annotations

import hashlib


def derive(seed: int, *what: str | int) -> int:
    """A 63-bit seed for one draw, e.g. `derive(seed, "noise", step, micro)`; distinct arguments, independent draws."""
    text = "\x1f".join([str(seed), *map(str, what)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
