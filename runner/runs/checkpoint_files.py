"""How checkpoints are named, and which there are."""

from __future__ import annotations

from pathlib import Path


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}.safetensors"


def checkpoint_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, checkpoint), newest first. Other files in the folder are left alone."""
    found = []
    for path in folder.glob("step-*.safetensors"):
        digits = path.stem.removeprefix("step-")
        if digits.isdecimal() and path.name == checkpoint_name(int(digits)):
            found.append((int(digits), path))
    return sorted(found, reverse=True)
