"""How much of a caption CLIP and T5 read, by their tokenizers' files alone. No torch: `transformers` would bring it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDERS = {"clip": "tokenizer", "t5": "tokenizer_2"}
NAMES = {"clip": "CLIP", "t5": "T5"}
CLIP_READS = 77

# What CLIP's tokenizer takes for a word before it looks for pieces (the pattern of OpenAI's simple_tokenizer.py).
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class TruncatedCaption:
    """count: tokens with the marks of begin and end; unread: the text behind what the encoder sees."""

    count: int
    unread: str


class CaptionReader:
    """An encoder's tokenizer; raises OSError or ValueError where its files are missing or broken."""

    def __init__(self, base: Path, encoder: str) -> None:
        self.encoder = encoder
        self.tokenizer = _tokenizer(base / FOLDERS[encoder], encoder)
        self.added: set[str] = set()

    def read(self, caption: str, pieces: Sequence[str], limit: int) -> TruncatedCaption:
        """`caption` with placeholders put in; `pieces`: new vocabulary that this encoder learns."""
        marks = 2 if self.encoder == "clip" else 1
        ids, spans = self._plain(caption, pieces)
        room = limit - marks
        cut = spans[room][0] if len(ids) > room else len(caption)
        return TruncatedCaption(len(ids) + marks, caption[cut:].strip())

    def taken(self, pieces: Sequence[str]) -> list[str]:
        """Those that the tokenizer brings itself."""
        return [piece for piece in pieces if piece not in self.added and self.tokenizer.token_to_id(piece) is not None]

    def _plain(self, caption: str, pieces: Sequence[str]) -> tuple[list[int], list[tuple[int, int]]]:
        new = [piece for piece in pieces if self.tokenizer.token_to_id(piece) is None]
        if new:
            self.tokenizer.add_tokens(new)
            self.added.update(new)
        found = self.tokenizer.encode(caption, add_special_tokens=False)
        return found.ids, found.offsets


def _tokenizer(folder: Path, encoder: str) -> Any:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        try:
            made = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises its plain Exception
            raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer ({error})") from error
        made.no_truncation()
        made.no_padding()
        return made
    if encoder == "clip":
        return _clip_of_parts(folder)
    raise FileNotFoundError(f"{folder} holds no tokenizer.json")


def _clip_of_parts(folder: Path) -> Any:
    """FLUX.1-dev's repository has CLIP's vocabulary and merges, and no tokenizer.json."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split() for line in lines if not line.startswith("#version")]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    end = "<|endoftext|>"
    model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=end)
    made = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return made
