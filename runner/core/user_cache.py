"""The folder for what fluxrun keeps for a user, outside of any runs folder. Everything in it can be deleted."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """$XDG_CACHE_HOME/fluxrun, by default ~/.cache/fluxrun. It may not exist."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "fluxrun"
