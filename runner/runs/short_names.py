"""Short labels for the runs of sweeps, and long names cut to a width so that they can still be told apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.cells import cell_len


def short_labels(names: Sequence[str]) -> list[str]:
    """The values that a sweep varies: "SWEEP/lora.rank=4,train.lr=0.001" -> "rank=4, lr=0.001", with "SWEEP: " before
    them if there are several sweeps. The names as they are, if two labels would be equal."""
    sweeps = {name.partition("/")[0] for name in names if "/" in name}
    labels = []
    for name in without_tables(names):
        sweep, _, values = name.partition("/")
        short = values.replace(",", ", ")
        labels.append(name if not values else f"{sweep}: {short}" if len(sweeps) > 1 else short)
    return labels if len(set(labels)) == len(labels) else list(names)


def without_tables(names: Sequence[str]) -> list[str]:
    """ "SWEEP/lora.rank=4,train.lr=0.001" -> "SWEEP/rank=4,lr=0.001". The names as they are, if two would become
    equal."""
    short = [re.sub(r"(?<=[/,])(?:[a-z_0-9]+\.)+(?=[a-z_0-9]+=)", "", name) for name in names]
    return short if len(set(short)) == len(set(names)) else list(names)


def shortened(texts: Sequence[str], width: int) -> list[str]:
    """Each text cut in the middle to at most `width` columns; the name of a sweep is kept. Different texts stay
    different."""
    forms = zip(texts, without_tables(texts), map(_without_keys, texts), strict=True)
    form = {each[0]: next((text for text in each if _has_room(text, width)), each[-1]) for each in forms}
    short = {text: _cut(form[text], width) for text in texts}
    for equal in _equal_texts(short):  # show the part where they differ
        start = _common_start([form[text] for text in equal])
        short |= {text: _cut_at(form[text], start, width) for text in equal}
    for equal in _equal_texts(short):
        for number, text in enumerate(equal[1:], 2):
            mark = f"~{number}"
            short[text] = _first(short[text], width - len(mark)) + mark
    return [short[text] for text in texts]


def _without_keys(text: str) -> str:
    """ "SWEEP/lora.rank=4,train.lr=0.001" -> "SWEEP/4,0.001"."""
    return re.sub(r"([/,] ?|: )[a-z_0-9.]+=", r"\1", text)


def _sweep_width(text: str) -> int:
    """Columns of the sweep's name in "SWEEP/lora.rank=4" or in the label "SWEEP: rank=4"; 0 where there is none."""
    sweep = re.match(r"[^/:]+(?:/|: )", text)
    return cell_len(sweep[0]) if sweep else 0


def _has_room(text: str, width: int) -> bool:
    """Whether `width` holds all of the text's values and, with a third of it, its sweep's name."""
    sweep = _sweep_width(text)
    return cell_len(text) <= width or (sweep > 0 and min(sweep, width // 3) + 1 + cell_len(text) - sweep <= width)


def _common_start(texts: Sequence[str]) -> int:
    """How many characters all texts start with."""
    positions = enumerate(zip(*texts, strict=False))
    return next((index for index, letters in positions if len(set(letters)) > 1), min(map(len, texts)))


def _equal_texts(short: Mapping[str, str]) -> list[list[str]]:
    """Groups of texts that were cut to the same."""
    groups: dict[str, list[str]] = {}
    for text, cut in short.items():
        groups.setdefault(cut, []).append(text)
    return [group for group in groups.values() if len(group) > 1]


def _cut(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    sweep, half = _sweep_width(text), width // 2
    if sweep:  # all of its name, or what the values leave, but at least a third
        half = sweep if sweep <= half else max(width // 3, min(sweep, width - 2 - (cell_len(text) - sweep)))
    head = _first(text, half)
    return f"{head}…{_last(text, width - 1 - cell_len(head))}"


def _cut_at(text: str, start: int, width: int) -> str:
    """The part that begins at `start`, after as much of the text's start as there is room for."""
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
