"""What is wrong with a value that is not TOML, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Callable

from runner.spec.toml_syntax import ASSIGNMENT, LONGEST_SHOWN, got, is_value, without_comment

# What stands for quotes elsewhere.
TYPOGRAPHIC = "\u201c\u201d\u201e\u201f\u2033\u2018\u2019\u201a\u2032\u00ab\u00bb\uff02\uff07"
ALL_QUOTES = TYPOGRAPHIC + "\"'"
BOOLEANS = {
    **dict.fromkeys(("True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), "true"),
    **dict.fromkeys(("False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), "false"),
}
NULLS = {"None", "none", "null", "NULL", "Null", "nil", "undefined", "~"}
COMMENTS = ("//", "--", "/*", ";")  # what a comment begins with in other languages
UNITS = "px|pixels?|steps?|epochs?|min|minutes?"
VALUE_AND_REST = r"""(?P<value>"(?:\\.|[^"\\])*"|'[^']*'|\[[^\[\]]*\]|[^\s,;"'\[{/=]+)\s*(?P<rest>.*)"""
LONGEST_NUMBER = 40  # characters


def value_fault(value: str, column: int, reason: str) -> str:
    """What is wrong with the text after `=`, or with the rest of a list from the place of the fault.

    column: of the place in `value` where tomllib stopped, counted from 1; reason: tomllib's.
    """
    text = value.strip()
    if not without_comment(text).strip() or text.startswith("#"):
        return "expected a value after =; write one, or remove the line"
    if text[0] in TYPOGRAPHIC or (
        text[0] in "\"'" and reason.startswith(("Illegal", "Unterminated")) and text[-1:] in TYPOGRAPHIC
    ):
        inner = without_comment(text).strip(ALL_QUOTES + " ")
        return f"expected straight quotes, {got(text)}; write {quoted(inner)}"
    if message := _after_value(without_comment(text)):
        return message
    kinds: dict[str, Callable[[str, int, str], str]] = {
        '"': _double_quoted, "'": _single_quoted, "[": _list, "{": _inline_table
    }  # fmt: skip
    if text[0] in kinds:
        return kinds[text[0]](text, column - (len(value) - len(value.lstrip())), reason)
    return _word(without_comment(text).strip())


def repaired(word: str) -> str:
    """A value as it was probably meant; text in quotes where nothing better is known."""
    for text in (word, word.rstrip(",; ")):
        if is_value(text):
            return text
    word = word.rstrip(",; ")
    return BOOLEANS.get(word) or _number(word) or quoted(word.strip(ALL_QUOTES))


def quoted(text: str) -> str:
    """As TOML text that needs no escapes."""
    if "\\" in text:
        return f'"{text.replace(chr(92), "/")}"'
    return f"'{text}'" if '"' in text else f'"{text}"'


def missing_comma(before: str) -> str:
    """before: the part of a list in front of the missing comma."""
    last = re.findall(r'"(?:\\.|[^"\\])*"|\'[^\']*\'|[^\s,\[]+', before)
    return f"expected a comma after {last[-1] if last else 'a value'}; write one"


def _after_value(text: str) -> str:
    """Of what may not follow a value that is valid by itself; "" where there is no such thing."""
    value = text.rstrip(",; ")
    if value in NULLS:
        return _word(value)
    if value and value != text and (is_value(value) or value[0] not in "\"'[{="):
        mark = "semicolon" if ";" in text[len(value) :] else "comma"
        return f"expected no {mark} after a value, {got(text)}; write {repaired(value)}"
    measured = re.fullmatch(rf"(?P<number>[\d.,_]+)\s*(?:{UNITS})", text)
    if measured and _is_number(measured["number"]):
        return f"expected a number without its unit, {got(text)}; write {repaired(measured['number'])}"
    parts = re.fullmatch(VALUE_AND_REST, text)
    if not parts or not (is_value(parts["value"]) or parts["value"] in BOOLEANS or _is_number(parts["value"])):
        return ""
    value, rest = repaired(parts["value"]), parts["rest"]
    if rest.startswith(COMMENTS) and not set(rest) & {'"', "'"}:
        return f"expected # before a comment, {got(text)}; write {value} # {rest.strip('/;-*! ')}"
    if (following := rest.lstrip(",; ")) and ASSIGNMENT.match(following):
        return f"expected one key per line, {got(text)}; write {value}, and on the next line {following}"
    return ""


def _double_quoted(text: str, column: int, reason: str) -> str:
    if reason.startswith(("Unescaped", "Invalid hex", "Escaped character")):
        return _backslash(text[1 : text.rfind('"')] if text.count('"') > 1 else text[1:])
    if reason.startswith(("Illegal character '\\n'", "Unterminated")):
        if text.endswith('\\"'):
            return _backslash(text[1:-1])
        return f'the text is not closed, {got(text)}; write " at its end'
    if reason.startswith("Illegal character"):
        return f"expected no control character in text, {got(repr(text)[1:-1])}; remove it"
    inner = without_comment(text).rstrip('"').lstrip('"')
    return f"the text ends before the line does, {got(text)}; write '{inner}' in single quotes, or \\\" inside of it"


def _backslash(inner: str) -> str:
    problem = f"a backslash in double quotes begins an escape like \\n, {got(f'{chr(34)}{inner}{chr(34)}')}"
    if " " in inner.strip() and ":\\" not in inner and not inner.startswith("\\"):
        return f"{problem}; write '{inner}' in single quotes"
    slashes = inner.replace("\\", "/")
    return f"{problem}; write \"{slashes}\", or '{inner}' in single quotes"


def _single_quoted(text: str, column: int, reason: str) -> str:
    inner = without_comment(text).strip("'")
    if "'" in inner and '"' not in inner and "\\" not in inner:
        return f'the text ends before the line does, {got(text)}; write "{inner}" in double quotes'
    return f"the text is not closed, {got(text)}; write ' at its end"


def _list(text: str, column: int, reason: str) -> str:
    before, rest = text[: column - 1], text[column - 1 :]
    if rest.lstrip().startswith(","):
        return f"expected one comma, {got(text)}; remove the other"
    if reason == "Unclosed array" and without_comment(text).rstrip().endswith("]"):
        return missing_comma(before)
    if reason == "Unclosed array" or not rest.strip():
        return f"the list is not closed, {got(text)}; write ] after its last value"
    entry = re.match(r'"(?:\\.|[^"\\])*"?|\'[^\']*\'?|[^,\]]+', rest)
    return value_fault(entry[0] if entry else rest, 0, reason)


def _inline_table(text: str, column: int, reason: str) -> str:
    return f'expected an inline table, {got(text)}; write it as in {{ name = "TOK", vectors = 2 }}'


def _word(word: str) -> str:
    if word.startswith("="):
        return f"expected one =, {got(f'={word}')}; write = {repaired(word.lstrip('= '))}"
    if word in BOOLEANS:
        return f"expected true or false, {got(word)}; write {BOOLEANS[word]}"
    if word in NULLS:
        return f"TOML has no null value, {got(word)}; for the default remove the line, or write # before it"
    if number := _number(word):
        return f"expected a number in TOML's form, {got(word)}; write {number}"
    text = quoted(word.strip(ALL_QUOTES))
    return f"expected quotes around text, {got(word)}; write {text if len(text) <= LONGEST_SHOWN else 'them around it'}"


def _is_number(text: str) -> bool:
    return bool(_number(text)) or (text[:1].isdigit() and is_value(text))


def _number(word: str) -> str:
    """The number that was meant, as TOML has it: 1,000 -> 1000, 0,5 -> 0.5, 50% -> 0.5, 04 -> 4. "" where it is
    none."""
    if len(word) > LONGEST_NUMBER:
        return ""
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", word) and not word.lstrip("+-").startswith("0"):
        return word.replace(",", "")
    if re.fullmatch(r"\d+(\.\d+)?\s*%", word):
        return f"{float(word.rstrip('% ')) / 100:g}"
    number = r"(?P<sign>[+-]?)(?P<whole>\d*)(?:\.(?P<part>\d*))?(?:[eE](?P<power>[+-]?\d+))?f?"
    found = re.fullmatch(number, word.replace(",", ".", 1))
    if not found or not (found["whole"] or found["part"]):
        return ""
    whole = (found["whole"] or "0").lstrip("0") or "0"
    part = "" if found["part"] is None else f".{found['part'] or 0}"
    power = f"e{found['power']}" if found["power"] else ""
    return f"{found['sign']}{whole}{part}{power}"
