"""A folder of class images for prior preservation.

Several runs may share it. The base generates the images that are missing; a note in the folder says of which prompt and
by which base they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.base.files import BaseIdentity, identity_of
from runner.core import files, hashing
from runner.core.hashing import content_key
from runner.data.image_files import PictureFolder, scan_folder
from runner.data.images import Picture
from runner.data.sources import opener

NOTE = "fluxrun-prior.json"


def scan(folder: Path) -> PictureFolder:
    """Its images by name, a user's own as well as generated ones, and what else is there."""
    return scan_folder(folder, deep=False) if folder.is_dir() else PictureFolder(folder, ())


def image_paths(folder: Path) -> list[Path]:
    return list(scan(folder).pictures)


def class_pictures(folder: Path, count: int, prompt: str) -> tuple[Picture, ...]:
    """The first `count` images, all with the class prompt as caption."""
    chosen = image_paths(folder)[:count]
    return tuple(Picture(f"class/{path.name}", str(path), prompt, opener(path)) for path in chosen)


def fingerprint(pictures: Sequence[Picture]) -> str:
    """Of the images' contents. It is in no phase key, since the images may not exist when a run is planned."""
    return content_key("class images", *(hashing.sha256_file(Path(picture.location)) for picture in pictures))


def folder_fault(folder: Path, count: int, runs: Path) -> str | None:
    """Why no class images can be generated there, or None. None too if the folder already holds `count` images."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        return f"expected a folder, got {str(folder)!r}, where {existing} is a file; name a folder"
    if not needs_filling(folder, count):
        return None
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"class images cannot be generated in {folder}: {existing} is not writable; name another folder"
    if folder.resolve() == runs.resolve():
        return f"this is the runs folder {runs}; name another folder"
    for path in (folder, *folder.parents):
        if (path / "plan.json").is_file() and (path / "spec.toml").is_file():
            return f"this is, or is inside, the folder of a run ({path}); name another folder"
    return None


def note_fault(folder: Path, prompt: str, base: BaseIdentity) -> tuple[str, str] | None:
    """(key of the spec, message) if the folder was filled for another prompt, or by another base."""
    note = _read_note(folder)
    noted_prompt = note.get("prompt")
    if noted_prompt is not None and noted_prompt != prompt:
        return "prior.prompt", (
            f"{folder} holds images of the prompt {noted_prompt!r}, got {prompt!r}; use another folder, or the same prompt"
        )
    maker = _noted_base(folder, note)
    if maker is None or not base.differs_from(maker):
        return None
    changed = f", got {base}" if str(base) != str(maker) else ", whose files have changed since then"
    return "prior.images", f"{folder} holds images made by {maker}{changed}; use another folder, or the same base"


def write_note(folder: Path, prompt: str, base: BaseIdentity) -> None:
    """Before images are generated there. An older note is kept."""
    if not _read_note(folder):
        made_by = {"base": base.name, "revision": base.revision, "fingerprint": base.fingerprint}
        files.write_json(folder / NOTE, {"prompt": prompt, **made_by})


def needs_filling(folder: Path, count: int) -> bool:
    """Whether the base still has to generate images there."""
    return len(image_paths(folder)) < count


def has_no_note(folder: Path) -> bool:
    """Whether fluxrun has no record of the prompt of its images: they are the user's own."""
    return not _read_note(folder)


def generated_path(folder: Path, number: int) -> Path:
    return folder / f"class-{number:05d}.png"


def _noted_base(folder: Path, note: Mapping[str, Any]) -> BaseIdentity | None:
    """The base of the note, if it can be compared.

    Notes of earlier versions have only its name, and were written even where a user had made all the images.
    """
    name, revision, fingerprint = (note.get(key) for key in ("base", "revision", "fingerprint"))
    if not isinstance(name, str):
        return None
    if isinstance(fingerprint, str):
        return BaseIdentity(name, revision if isinstance(revision, str) else None, fingerprint)
    if not any(folder.glob("class-[0-9]*.png")) or (Path(name).is_absolute() and not Path(name).is_dir()):
        return None
    return identity_of(name, None)


def _read_note(folder: Path) -> dict[str, Any]:
    path = folder / NOTE
    if not path.is_file():
        return {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}
