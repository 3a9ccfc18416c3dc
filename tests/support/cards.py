"""The model card of an export."""

from __future__ import annotations

from pathlib import Path


def card_of(run: Path) -> tuple[str, str]:
    """The card, and its code."""
    card = (run / "export" / "README.md").read_text()
    [code] = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    return card, code
