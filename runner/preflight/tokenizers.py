"""How much of a caption CLIP and T5 read, by their tokenizers' files alone, since `transformers` would import torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDERS = {"clip": "tokenizer", "t5": "tokenizer_2"}
NAMES = {"clip": "CLIP", "t5": "T5"}
CLIP_READS = 77  # tokens

# How CLIP's tokenizer splits a text into words, before it splits words (from OpenAI's simple_tokenizer.py).
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class TruncatedCaption:
    """How a caption is read. count: its tokens, with the begin and end tokens; unread: the text that is cut off."""

    count: int
    unread: str


class CaptionReader:
    """An encoder's tokenizer. Raises OSError or ValueError where its files are missing or broken."""

    def __init__(self, base: Path, encoder: str) -> None:
        self.encoder = encoder
        self.tokenizer = _tokenizer(base / FOLDERS[encoder], encoder)
        self.added: set[str] = set()

    def read(self, caption: str, entries: Sequence[str], limit: int) -> TruncatedCaption:
        """Tokenize a caption. entries: vocabulary entries to add, which this encoder learns; limit: tokens it reads."""
        special = 2 if self.encoder == "clip" else 1  # begin and end tokens
        ids, spans = self._tokenize(caption, entries)
        room = limit - special
        cut = spans[room][0] if len(ids) > room else len(caption)
        return TruncatedCaption(len(ids) + special, caption[cut:].strip())

    def existing(self, entries: Sequence[str]) -> list[str]:
        """Those entries that are in the tokenizer's own vocabulary."""
        return [entry for entry in entries if entry not in self.added and self.tokenizer.token_to_id(entry) is not None]

    def _tokenize(self, caption: str, entries: Sequence[str]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of the caption's tokens, and where each begins and ends in the text; without special tokens."""
        new = [entry for entry in entries if self.tokenizer.token_to_id(entry) is None]
        if new:
            self.tokenizer.add_tokens(new)
            self.added.update(new)
        encoding = self.tokenizer.encode(caption, add_special_tokens=False)
        return encoding.ids, encoding.offsets


def _tokenizer(folder: Path, encoder: str) -> Any:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer ({error})") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    if encoder == "clip":
        return _clip_tokenizer(folder)
    raise FileNotFoundError(f"{folder} holds no tokenizer.json")


def _clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer from its vocabulary and merges: FLUX.1-dev's repository has no tokenizer.json for it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split() for line in lines if not line.startswith("#version")]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    end = "<|endoftext|>"
    model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=end)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer
