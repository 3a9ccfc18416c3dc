"""What a run's exported files are called. No torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

SAFE = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?")
_KEY = r"[a-z0-9_]+(?:\.[a-z0-9_]+)*"
_VALUE = r"(?:[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?|[A-Za-z][A-Za-z0-9]*)"
# A sweep's run whose values keep apart what `file_stem` joins by hyphens: numbers and plain words.
SWEPT = re.compile(rf"[A-Za-z0-9_-]+/{_KEY}={_VALUE}(?:,{_KEY}={_VALUE})*")
DIGITS = 6  # hexadecimal, of a name's digest


def file_stem(name: str) -> str:
    """A run's name as a file name and a word in a prompt: letters, digits, - and _ alone.

    `=` and `,` end a name in A1111's `<lora:NAME:1>`, a `.` ends it where programs cut off an ending, and `+` is a weight
    or a space in some. A name of safe letters stays as it is, but for the / of a folder; "one/lora.rank=4,train.lr=0.01" is
    "one-lora-rank-4-train-lr-0_01". Names that could become the same word have a few digits of their digest behind it.
    """
    if SAFE.fullmatch(name):
        return name.replace("/", "-")
    decimal = re.sub(r"(?<=[0-9])\.(?=[0-9])", "_", name)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", decimal).strip("-")
    if SWEPT.fullmatch(name):
        return stem
    return f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:DIGITS]}".lstrip("-")


def kohya_file(name: str) -> str:
    return f"{file_stem(name)}.safetensors"


def embeddings_file(name: str) -> str:
    return f"{file_stem(name)}_emb.safetensors"


def webui_file(name: str) -> str:
    """CLIP's rows alone, beside an embeddings file with several keys: Forge and A1111 refuse those."""
    return f"{file_stem(name)}_emb_webui.safetensors"


def find_embeddings(folder: Path, name: str) -> Path | None:
    """A run's embeddings, also under the name that they had before export names were made safe; None where it has none."""
    former = f"{name.replace('/', '-')}_emb.safetensors"
    return next((folder / file for file in (embeddings_file(name), former) if (folder / file).is_file()), None)
