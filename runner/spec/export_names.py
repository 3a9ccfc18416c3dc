"""The names of a run's exported files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

SAFE = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?")
_KEY = r"[a-z0-9_]+(?:\.[a-z0-9_]+)*"
_VALUE = r"(?:[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?|[A-Za-z][A-Za-z0-9]*)"
# The name of a sweep's run whose values are numbers and plain words: no two of these become the same in `file_stem`.
SWEPT = re.compile(rf"[A-Za-z0-9_-]+/{_KEY}={_VALUE}(?:,{_KEY}={_VALUE})*")
DIGITS = 6  # hexadecimal digits of a name's digest


def file_stem(name: str) -> str:
    """A run's name as a file name and as a word in a prompt: letters, digits, - and _ alone.

    In A1111's `<lora:NAME:1>` a `=` or `,` ends the name; a `.` ends it in programs that cut off file endings; `+` is a
    weight or a space in some. A name without such characters stays as it is, with - for /.
    "one/lora.rank=4,train.lr=0.01" becomes "one-lora-rank-4-train-lr-0_01". A name that another could become too ends
    with a few digits of its digest.
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
    """CLIP's embeddings alone, for Forge and A1111, which refuse a file with several keys."""
    return f"{file_stem(name)}_emb_webui.safetensors"


def find_embeddings(folder: Path, name: str) -> Path | None:
    """A run's embeddings file, also under the name that earlier versions gave it; None where there is none."""
    former = f"{name.replace('/', '-')}_emb.safetensors"
    return next((folder / file for file in (embeddings_file(name), former) if (folder / file).is_file()), None)
