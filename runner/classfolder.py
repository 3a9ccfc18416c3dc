"""A folder of class images for prior preservation: shared by runs, filled up by the base, its prompt remembered. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner import files
from runner.data import Picture
from runner.digest import key_of
from runner.sources import SUFFIXES, opener

NOTE = "fluxrun-prior.json"


def paths(folder: Path) -> list[Path]:
    """The images that are there, by name; a user's own count as well as made ones."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def pictures(folder: Path, count: int, prompt: str) -> tuple[Picture, ...]:
    """The first `count` images, all with the class prompt."""

    return tuple(Picture(f"class/{path.name}", str(path), prompt, opener(path)) for path in paths(folder)[:count])


def fingerprint(chosen: Sequence[Picture]) -> str:
    """Of the images themselves: which they are cannot be in a plan's key, since they may not exist yet."""
    return key_of("class images", *(files.sha256_file(Path(picture.where)) for picture in chosen))


def disagreement(folder: Path, prompt: str) -> str | None:
    """What is wrong where the folder was filled for another prompt."""
    remembered = _note(folder).get("prompt")
    if remembered is None or remembered == prompt:
        return None
    return (
        f"{folder} holds images of another prompt (found {prompt!r}, there {remembered!r}); use another folder, "
        "or the same prompt"
    )


def remember(folder: Path, prompt: str, base: str) -> None:
    files.make_folder(folder)
    if not _note(folder):
        files.write_json(folder / NOTE, {"prompt": prompt, "base": base})


def _note(folder: Path) -> dict[str, Any]:
    path = folder / NOTE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
