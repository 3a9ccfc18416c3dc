"""Credentials in a spec: found so that they can be refused, and never shown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

SECRET_KEYS = (
    "token", "hf_token", "hub_token", "huggingface_token", "access_token", "api_key", "apikey", "wandb_api_key", "password",
    "secret",
)  # fmt: skip
HUB_TOKEN = "hf_"  # what the hub's tokens begin with
_IN_A_LINE = re.compile(rf"{HUB_TOKEN}\w|(?:^|[\s,{{.])[\"']?(?:{'|'.join(SECRET_KEYS)})[\"']?\s*[=:]", re.IGNORECASE)
_REFUSED = "a spec must not contain secrets (not shown); remove it, and use the environment variable "


def secret_faults(tables: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, message) of the values that look like a credential, by their key or by how they begin."""
    items = tables.items() if isinstance(tables, Mapping) else enumerate(tables) if isinstance(tables, list) else ()
    for name, value in items:
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, str) and (str(name).lower() in SECRET_KEYS or value.startswith(HUB_TOKEN)):
            is_wandb = "wandb" in str(name).lower()
            yield key, _REFUSED + ("WANDB_API_KEY or `wandb login`" if is_wandb else "HF_TOKEN or `hf auth login`")
        else:
            yield from secret_faults(value, key)


def may_hold_secret(line: str) -> bool:
    """Of text that is not TOML, so that its keys and values cannot be told apart for certain."""
    return _IN_A_LINE.search(line) is not None
