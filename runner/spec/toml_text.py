"""Values as they are written in TOML, on one line."""

from __future__ import annotations

from typing import Any

import tomli_w


def toml_line(key: str, value: Any) -> str:
    """`key = value`; the key in quotes where it needs them."""
    name = tomli_w.dumps({key: 0}).removesuffix(" = 0\n")
    return f"{name} = {toml_value(value)}"


def toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(toml_line(*item) for item in value.items())}}}"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")
