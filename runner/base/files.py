"""What the files of a base model tell without loading it: where it is, which one it is, its configs and its licence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.base.architectures import architecture_of
from runner.base.layers import KNOWN_BASES
from runner.core.errors import FluxrunError
from runner.core.hashing import content_key

PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
BUILTIN = {"builtin:tiny": Path(__file__).parents[1] / "bases" / "tiny"}
SAMPLE = 1 << 16  # bytes that are hashed at each of three places of a weight file
# As stated on their hub pages, for bases whose README is not on this disk.
DEV_LICENCE = {
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
    "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
}
LICENCES = {
    "black-forest-labs/FLUX.1-dev": DEV_LICENCE,
    "black-forest-labs/FLUX.1-Krea-dev": DEV_LICENCE,
    "black-forest-labs/FLUX.1-schnell": {"license": "apache-2.0"},
}


def licence(text: str, folder: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` from the front matter of the base's README; {} where nothing is
    known. A link relative to the base's repository is made absolute."""
    readme = folder / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
    terms: dict[str, str] = {}
    if lines[:1] == ["---"] and "---" in lines[1:]:
        for line in lines[1 : lines.index("---", 1)]:
            key, colon, value = line.partition(":")
            if colon and key in ("license", "license_name", "license_link"):
                terms[key] = value.strip().strip("\"'")
    link = terms.get("license_link", "")
    if link and "://" not in link:
        terms.pop("license_link")
        if local_folder(text) is None:
            terms["license_link"] = f"https://huggingface.co/{text}/blob/main/{link}"
    return terms or dict(LICENCES.get(text, {}))


def local_folder(text: str) -> Path | None:
    """The folder of a builtin base or of an absolute path; None for a hub id."""
    if text in BUILTIN:
        return BUILTIN[text]
    folder = Path(text)
    return folder if folder.is_absolute() and folder.is_dir() else None


def fingerprint(folder: Path) -> str:
    """Which model a folder holds, without reading its gigabytes.

    Hashes every config, and of every weight file its name, its size and 64 KiB at the start, the middle and the end.
    Another fine-tune of the same shape differs there; a copy on another machine does not.
    """
    digest = hashlib.sha256()
    for name, samples in _sampled(folder):
        digest.update(name)
        for sample in samples:
            digest.update(sample)
    return digest.hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """A digest like `fingerprint` of each file, by its name inside the folder."""
    return {
        json.loads(name)[0]: hashlib.sha256(b"".join((name, *samples))).hexdigest()
        for name, samples in _sampled(folder)
    }


def _sampled(folder: Path) -> Iterator[tuple[bytes, list[bytes]]]:
    """(name and size as JSON, the samples) of each file."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in {".json", ".txt", ".safetensors", ".model"}:
            continue
        size = path.stat().st_size
        with path.open("rb") as file:
            samples = []
            for start in (0, size // 2, size - SAMPLE):
                file.seek(max(0, start))
                samples.append(file.read(SAMPLE))
        yield json.dumps([path.relative_to(folder).as_posix(), size]).encode(), samples


def cached_base(base: str, revision: str | None) -> Path | None:
    """The base's folder on this disk: its own, or the one in the hub client's cache, which is named after the
    commit."""
    if (folder := local_folder(base)) is not None:
        return folder
    if base in BUILTIN or "/" not in base:
        return None
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(base, "model_index.json", revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def parts_fingerprint(folder: Path) -> str:
    """Of the parts that a run uses; other files in the folder do not count."""
    return content_key("base", *(fingerprint(folder / part) for part in PARTS))


@dataclass(frozen=True)
class BaseIdentity:
    """Which base it is. revision: the commit, if known. fingerprint: `parts_fingerprint`; None for a base of the
    hub."""

    name: str
    revision: str | None
    fingerprint: str | None

    def differs_from(self, other: BaseIdentity) -> bool:
        """False where what is known does not tell."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint != other.fingerprint
        if self.name != other.name:
            return True
        return None not in (self.revision, other.revision) and self.revision != other.revision

    def __str__(self) -> str:
        return self.name + (f" at revision {self.revision}" if self.revision else "")


def identity_of(name: str, revision: str | None) -> BaseIdentity:
    """As far as the files on this disk tell."""
    if folder := local_folder(name):
        return BaseIdentity(name, None, parts_fingerprint(folder))
    folder = cached_base(name, revision)
    return BaseIdentity(name, folder.name if folder else revision, None)


def transformer_config(text: str, folder: Path | None) -> Mapping[str, Any] | None:
    """The transformer's config, or None for a hub model that is not on this disk."""
    if folder is None:
        return KNOWN_BASES.get(text)
    path = folder / "transformer" / "config.json"
    return json.loads(path.read_text()) if path.is_file() else None


def clip_config(folder: Path | None) -> Mapping[str, Any] | None:
    """The CLIP encoder's config, or None for a hub model that is not on this disk."""
    path = folder / "text_encoder" / "config.json" if folder else None
    return json.loads(path.read_text()) if path and path.is_file() else None


def broken_configs(folder: Path) -> list[str]:
    """What is wrong with those configs that a plan reads and that exist."""
    try:
        architecture = architecture_of(_read_config(folder, "transformer"))
    except FluxrunError as error:  # of another kind of model
        return [str(error).removeprefix("model.base: ")]
    except ValueError:  # reported below
        architecture = architecture_of(None)
    faults = []
    for part, keys in architecture.needed.items():
        path = folder / part / "config.json"
        if not path.is_file():
            continue
        try:
            config = _read_config(folder, part)
        except ValueError as error:
            faults.append(f"{path} is not JSON ({error}); fetch it again")
            continue
        if missing := [key for key in keys if not isinstance(config.get(key), int)]:
            faults.append(
                f"{path} does not say {', '.join(missing)}; it should be the config of a {architecture.name} model's {part}"
            )
    return faults


def _read_config(folder: Path, part: str) -> Mapping[str, Any]:
    """A part's config; {} where it has none, or one that is no JSON object. Raises ValueError where it is no JSON."""
    path = folder / part / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config if isinstance(config, dict) else {}
