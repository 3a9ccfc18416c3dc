"""The line that a fault is about, with what is wrong in it underlined: for terminals. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from runner.core.errors import Fault
from runner.core.user_text import NotUtf8Error, read_user_text

WIDEST = 160  # characters of a line that are shown
HIDDEN = "(not shown)"  # what a fault about a secret says


def excerpts(faults: Sequence[Fault]) -> dict[Fault, str]:
    """For each fault its line and carets below; none where the line holds a secret, where no line is there, or it cannot be read."""
    hidden = {(fault.file, fault.line) for fault in faults if HIDDEN in fault.message}
    absent = {(fault.file, fault.line, fault.key) for fault in faults if fault.message.startswith("required key")}
    texts: dict[Path, list[str]] = {}
    found = {}
    for fault in faults:
        if fault.file not in texts:
            texts[fault.file] = _lines(fault.file)
        lines = texts[fault.file]
        if (fault.file, fault.line, fault.key) in absent:
            continue  # no line could show it
        if fault.key and 0 < fault.line <= len(lines) and not _stands_in(fault.key, lines[fault.line - 1]):
            continue  # a default, or what a table is told for
        if (fault.file, fault.line) not in hidden and 0 < fault.line <= len(lines) and lines[fault.line - 1].strip():
            found[fault] = _excerpt(fault, lines[fault.line - 1])
    return found


def _stands_in(key: str, line: str) -> bool:
    return any(part in line for part in key.split(".") if not part.isdigit())


def _lines(file: Path) -> list[str]:
    try:
        return read_user_text(file).split("\n")
    except (OSError, NotUtf8Error):
        return []


def _excerpt(fault: Fault, line: str) -> str:
    line = "".join(c if c.isprintable() else " " for c in line)[:WIDEST]
    start, stop = _span(fault, line)
    number = f"{fault.line:>5} | "
    return f"{number}{line}\n{' ' * (len(number) - 2)}| {' ' * start}{'^' * max(1, stop - start)}"


def _span(fault: Fault, line: str) -> tuple[int, int]:
    """The key where the key is wrong, its value where that is, else the whole statement."""
    whole = len(line) - len(line.lstrip()), len(_uncommented(line).rstrip())
    name = re.escape(fault.key.rpartition(".")[2])
    swept = rf'"{re.escape(fault.key.removeprefix("sweep."))}"'
    if not fault.key or not (found := re.search(rf"(?:{swept}|(?<![\w-]){name}(?![\w-]))(?P<is>\s*=\s*)?", line)):
        return whole
    if fault.message.startswith("unknown key") or not found["is"]:
        return found.start(), found.end() - len(found["is"] or "")
    return (found.end(), whole[1]) if found.end() < whole[1] else whole


def _uncommented(line: str) -> str:
    """Less a comment behind the value; a # in a string is none."""
    found = re.match(r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|[^"'#])*""", line)
    return found[0] if found and found[0].strip() else line
