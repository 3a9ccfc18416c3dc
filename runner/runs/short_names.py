"""Names that are too long for their place, cut so that they can still be told apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.cells import cell_len

from runner.runs.index import without_tables


def shortened(texts: Sequence[str], width: int) -> list[str]:
    """Each in at most `width` columns, cut in the middle, a sweep's name kept; different ones stay different."""
    forms = zip(texts, without_tables(texts), map(_without_keys, texts), strict=True)
    form = {one[0]: next((text for text in one if _tells(text, width)), one[-1]) for one in forms}
    short = {text: _cut(form[text], width) for text in texts}
    for alike in _alike(short):  # where they differ must be seen, then
        start = _same_beginning([form[text] for text in alike])
        short |= {text: _cut_at(form[text], start, width) for text in alike}
    for alike in _alike(short):
        for number, text in enumerate(alike[1:], 2):
            mark = f"~{number}"
            short[text] = _first(short[text], width - len(mark)) + mark
    return [short[text] for text in texts]


def _without_keys(text: str) -> str:
    """ "SWEEP/lora.rank=4,train.lr=0.001" -> "SWEEP/4,0.001"."""
    return re.sub(r"([/,] ?|: )[a-z_0-9.]+=", r"\1", text)


def _sweep_name(text: str) -> int:
    """How wide the name of its sweep is, in "SWEEP/lora.rank=4" as in the label "SWEEP: rank=4"; 0 where it has none."""
    found = re.match(r"[^/:]+(?:/|: )", text)
    return cell_len(found[0]) if found else 0


def _tells(text: str, width: int) -> bool:
    """Whether it has room for all of its values and a third of its width for its sweep's name."""
    name = _sweep_name(text)
    return cell_len(text) <= width or (name > 0 and min(name, width // 3) + 1 + cell_len(text) - name <= width)


def _same_beginning(texts: Sequence[str]) -> int:
    """How many characters all of them begin with."""
    places = enumerate(zip(*texts, strict=False))
    return next((at for at, letters in places if len(set(letters)) > 1), min(map(len, texts)))


def _alike(short: Mapping[str, str]) -> list[list[str]]:
    """The texts that have become the same."""
    groups: dict[str, list[str]] = {}
    for text, cut in short.items():
        groups.setdefault(cut, []).append(text)
    return [group for group in groups.values() if len(group) > 1]


def _cut(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    name, half = _sweep_name(text), width // 2
    if name:  # all of it, or else what the values leave, a third at least
        half = name if name <= half else max(width // 3, min(name, width - 2 - (cell_len(text) - name)))
    head = _first(text, half)
    return f"{head}…{_last(text, width - 1 - cell_len(head))}"


def _cut_at(text: str, start: int, width: int) -> str:
    """With the part that begins at `start`, and as much of the text's beginning as there is room for."""
    part = _first(text[start:], max(width - 5, width * 2 // 3))
    end = "…" if start + len(part) < len(text) else ""
    return f"{_first(text[:start], width - 1 - cell_len(part + end))}…{part}{end}"


def _first(text: str, width: int) -> str:
    while cell_len(text) > max(0, width):
        text = text[:-1]
    return text


def _last(text: str, width: int) -> str:
    while cell_len(text) > max(0, width):
        text = text[1:]
    return text
