"""What is wrong with a text that is not TOML, and what to write instead: tomllib says neither, and often names another
line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from runner.spec.secrets import may_hold_secret
from runner.spec.toml_lines import key_lines
from runner.spec.toml_syntax import ASSIGNMENT, HEADER, KEY, ParseError, got, heading, parse_error, without_comment
from runner.spec.toml_values import missing_comma, repaired, value_fault

MOST_FAULTS = 20  # of one file
LARGE = 100_000  # characters of a text of which only the first fault is reported
FORM = "write tables as [lora], keys as rank = 16, and text in quotes"


def toml_faults(text: str) -> list[tuple[int, str]]:
    """(line, message) for what is not TOML; [] where all of it is. After a faulty line the following ones are read
    too."""
    lines = text.split("\n")
    faults: list[tuple[int, str]] = []
    while len(faults) < (MOST_FAULTS if len(text) < LARGE else 1) and (error := parse_error(lines)):
        start = _faulty_statement(lines)
        line, message = _fault(lines, start, error)
        if may_hold_secret("\n".join(lines[start - 1 : error.line])):
            message = f"this line does not parse (not shown, as it may hold a secret); {FORM}"
        faults.append((line, message))
        assignment = ASSIGNMENT.match(lines[start - 1])
        if (
            not assignment
            or error.line > start
            or assignment["value"].count("[") > assignment["value"].count("]")
        ):  # fmt: skip
            break  # what follows a broken table or list cannot be read rightly
        lines[start - 1] = ""
    return faults


def _faulty_statement(lines: Sequence[str]) -> int:
    """The line on which the first statement that is not TOML begins: all lines before it parse, and not with it."""
    low, high = 0, len(lines)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parse_error(lines[:middle]) is None else (low, middle)
    return high


def _fault(lines: Sequence[str], start: int, error: ParseError) -> tuple[int, str]:
    """(line, message). start: the line on which the faulty statement begins."""
    statement = lines[start - 1]
    for mark in ('"""', "'''"):
        if statement.count(mark) % 2:
            return start, f"the text that begins with {mark} here is not closed; write {mark} at its end"
    if start < error.line:
        return _in_long_list(lines, start, error)
    if statement.lstrip().startswith("["):
        return start, _header(lines, start, error.reason)
    assignment = ASSIGNMENT.match(statement)
    if assignment is None:
        return start, _no_assignment(statement, lines[start:])
    if _is_repetition(error.reason):
        key, first = assignment["key"], _first_line(lines, start, assignment["key"])
        return start, f"{key} is here a second time{first and f' (first in{first})'}; remove one of them"
    return start, value_fault(assignment["value"], error.column - assignment.start("value"), error.reason)


def _is_repetition(reason: str) -> bool:
    return any(word in reason for word in ("overwrite", "immutable", "twice"))


def _in_long_list(lines: Sequence[str], start: int, error: ParseError) -> tuple[int, str]:
    """In a list of several lines."""
    line = lines[error.line - 1]
    at_the_end = (error.line, error.column) >= (len(lines), len(lines[-1]))
    if at_the_end or HEADER.match(line) or ASSIGNMENT.match(line):
        return start, "the list that begins here is not closed; write ] after its last value"
    before, after = line[: error.column - 1].strip(), line[error.column - 1 :]
    if error.reason == "Unclosed array" and not before.rstrip(","):
        above = range(error.line - 1, 0, -1)
        last = next(n for n in above if lines[n - 1].strip() and not lines[n - 1].lstrip().startswith("#"))
        return last, missing_comma(without_comment(lines[last - 1]))
    if error.reason == "Unclosed array":
        return error.line, missing_comma(before)
    if after.lstrip().startswith(","):
        return error.line, f"expected one comma, {got(line)}; remove the other"
    return error.line, value_fault(after.rstrip("], "), 0, error.reason)


def _header(lines: Sequence[str], start: int, reason: str) -> str:
    line = lines[start - 1]
    header = HEADER.match(line)
    if header is None:
        return f"expected a table's name in brackets, {got(line)}; write it as in [lora]"
    name, opened, closed = header["name"], header["open"], header["close"]
    if len(closed) != len(opened):
        return f"the brackets around a table's name do not match, {got(line)}; write {heading(name)}"
    first = _first_line(lines, start, name)
    if heading(name) != f"{opened}{name}{closed}":
        return f"{opened}{name}{closed} is allowed only once; write {heading(name)}, here{first and f' and in{first}'}"
    if not _is_repetition(reason):
        return f"expected the name of a table, {got(line)}; write it as in [lora]"
    if opened == "[[":
        return f"{name} is another kind of value{first and f' in{first}'}; write [[{name}]] there, too"
    return f"[{name}] is here a second time{first and f' (first in{first})'}; write its keys below the first one"


def _first_line(lines: Sequence[str], start: int, dotted: str) -> str:
    """ " line 3": where the same key or table is above the line `start`; "" where that cannot be told."""
    path = tuple(part.strip().strip("\"'") for part in dotted.split("."))
    table: tuple[str, ...] = ()
    if not HEADER.match(lines[start - 1]):
        headers = (HEADER.match(line) for line in reversed(lines[: start - 1]))
        table = next((tuple(header["name"].split(".")) for header in headers if header), ())
    above = key_lines("\n".join(lines[: start - 1]))
    same = [line for where, line in above.items() if tuple(p for p in where if isinstance(p, str)) == (*table, *path)]
    return f" line {same[-1]}" if same else ""


def _no_assignment(line: str, below: Sequence[str]) -> str:
    text = line.strip()
    next_line = next((following for following in below if following.strip()), "")
    if text == "---":
        return f"this looks like YAML, {got(text)}; {FORM}"
    table = re.fullmatch(rf"(?P<key>{KEY})\s*:", without_comment(text))
    if table and next_line.startswith((" ", "\t", "- ")):
        return f"this looks like YAML, {got(text)}; write {heading(table['key'])}, and keys below it as rank = 16"
    if text.startswith(("//", ";", "--", "/*", "<!--")):
        return f"expected # before a comment, {got(text)}; write # {text.lstrip('/;-*<! ')}"
    if pair := re.fullmatch(rf"(?P<key>{KEY})\s*:=?\s*(?P<value>.*)", text):
        return _no_equals(text, pair)
    if text.startswith(("{", "}", "- ")):
        return f"this looks like JSON or YAML, {got(text)}; write tables as [lora] and keys as rank = 16"
    if "=" in text:
        return f"expected the name of a key before =, {got(text)}; names have letters, digits, - and _, as in rank = 16"
    if pair := re.fullmatch(rf"(?P<key>{KEY})\s+(?P<value>.+)", text):
        return _no_equals(text, pair)
    return f"expected a table or a key with its value, {got(text)}; write tables as [lora] and keys as rank = 16"


def _no_equals(text: str, pair: re.Match[str]) -> str:
    value = without_comment(pair["value"]).strip().rstrip(",")
    return f"expected = between key and value, {got(text)}; write {pair['key']} = {repaired(value)}"
