"""Keys by content."""

from __future__ import annotations

import hashlib
import json


def key_of(*parts: str | int | float | bytes | None) -> str:
    """SHA-256 of a sequence of values; ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part).encode()
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()
