"""Source excerpts: the line of a spec that a fault is about, with carets below what is wrong in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from runner.core.errors import Fault
from runner.core.user_text import NotUtf8Error, read_user_text

MAX_WIDTH = 160  # characters of a line that are shown
HIDDEN = "(not shown)"  # part of the message of every fault about a secret


def excerpts(faults: Sequence[Fault]) -> dict[Fault, str]:
    """The excerpt of each fault.

    A fault has none if its file cannot be read, if the line does not have the key (which is missing, or a default), or
    if the line holds a secret.
    """
    secret_lines = {(fault.file, fault.line) for fault in faults if HIDDEN in fault.message}
    missing_keys = {(fault.file, fault.line, fault.key) for fault in faults if fault.message.startswith("required key")}
    texts: dict[Path, list[str]] = {}
    shown = {}
    for fault in faults:
        if fault.file not in texts:
            texts[fault.file] = _lines(fault.file)
        lines = texts[fault.file]
        if (fault.file, fault.line) in secret_lines or (fault.file, fault.line, fault.key) in missing_keys:
            continue
        if not 0 < fault.line <= len(lines):
            continue
        line = lines[fault.line - 1]
        if line.strip() and (not fault.key or _mentions(line, fault.key)):
            shown[fault] = _excerpt(fault, line)
    return shown


def _mentions(line: str, key: str) -> bool:
    return any(part in line for part in key.split(".") if not part.isdigit())


def _lines(file: Path) -> list[str]:
    """The lines of a file; [] if it cannot be read."""
    try:
        return read_user_text(file).split("\n")
    except (OSError, NotUtf8Error):
        return []


def _excerpt(fault: Fault, line: str) -> str:
    line = "".join(c if c.isprintable() else " " for c in line)[:MAX_WIDTH]
    start, stop = _span(fault, line)
    number = f"{fault.line:>5} | "
    return f"{number}{line}\n{' ' * (len(number) - 2)}| {' ' * start}{'^' * max(1, stop - start)}"


def _span(fault: Fault, line: str) -> tuple[int, int]:
    """(start, stop) of what the carets mark: an unknown key, else the key's value, else the whole statement."""
    statement = len(line) - len(line.lstrip()), len(_uncommented(line).rstrip())
    name = re.escape(fault.key.rpartition(".")[2])
    swept = rf'"{re.escape(fault.key.removeprefix("sweep."))}"'
    match = re.search(rf"(?:{swept}|(?<![\w-]){name}(?![\w-]))(?P<equals>\s*=\s*)?", line) if fault.key else None
    if match is None:
        return statement
    if fault.message.startswith("unknown key") or not match["equals"]:
        return match.start(), match.end() - len(match["equals"] or "")
    return (match.end(), statement[1]) if match.end() < statement[1] else statement


def _uncommented(line: str) -> str:
    """The line without a comment at its end. A # inside a string starts no comment."""
    match = re.match(r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|[^"'#])*""", line)
    return match[0] if match and match[0].strip() else line
