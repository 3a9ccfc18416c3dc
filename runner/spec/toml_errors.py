"""What is wrong with a text that is not TOML, and what to type instead: tomllib says neither, and often not the right line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence

from runner.spec.secrets import may_hold_secret
from runner.spec.toml_lines import key_lines

MOST = 20  # faults of one file
LARGE = 100_000  # characters of a text of which only the first fault is told
LONGEST = 80  # characters of what was found
# what stands for quotes elsewhere
TYPOGRAPHIC = "\u201c\u201d\u201e\u201f\u2033\u2018\u2019\u201a\u2032\u00ab\u00bb\uff02\uff07"
KEY = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*"""
ASSIGNMENT = re.compile(rf"\s*(?P<key>{KEY})\s*=(?P<value>.*)")
HEADER = re.compile(r"\s*(?P<open>\[\[?)\s*(?P<name>[A-Za-z_\"'][^\]#]*?)\s*(?P<close>\]*)\s*(?:#.*)?$")
WORDS = {
    **dict.fromkeys(("True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), "true"),
    **dict.fromkeys(("False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), "false"),
}
FORM = "write tables as [lora], keys as rank = 16, and text in quotes"
COMMENTS = ("//", "--", "/*", ";")  # as other languages begin one
UNITS = "px|pixels?|steps?|epochs?|min|minutes?"
VALUE = r"""(?P<value>"(?:\\.|[^"\\])*"|'[^']*'|\[[^\[\]]*\]|[^\s,;"'\[{/=]+)\s*(?P<rest>.*)"""
NOTHING = {"None", "none", "null", "NULL", "Null", "nil", "undefined", "~"}


def toml_faults(text: str) -> list[tuple[int, str]]:
    """(line, message) of what is not TOML; [] where all of it is. After a fault in one line the rest is looked at, too."""
    lines = text.split("\n")
    told: list[tuple[int, str]] = []
    while len(told) < (MOST if len(text) < LARGE else 1) and (error := _error(lines)):
        start = _begins(lines)
        line, message = _explained(lines, start, *error)
        if may_hold_secret("\n".join(lines[start - 1 : error[0]])):
            message = f"this line does not parse (not shown, as it may hold a secret); {FORM}"
        told.append((line, message))
        found = ASSIGNMENT.match(lines[start - 1])
        if not found or error[0] > start or found["value"].count("[") > found["value"].count("]"):
            break  # what follows a broken table or list would be told wrongly
        lines[start - 1] = ""
    return told


def _error(lines: Sequence[str]) -> tuple[int, int, str] | None:
    """(line, column, tomllib's words), counted from 1."""
    text = "\n".join(lines)
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what = re.sub(r" \(at [^()]*\)$", "", str(error))
        if found := re.search(r"\(at line (\d+), column (\d+)\)$", str(error)):
            return int(found[1]), int(found[2]), what
        return len(lines), len(lines[-1]) + 1, what
    except ValueError as error:  # int() itself, for thousands of digits
        longest = max(range(len(lines)), key=lambda at: max(map(len, re.findall(r"\d+", lines[at])), default=0))
        return longest + 1, 1, str(error)
    return None


def _begins(lines: Sequence[str]) -> int:
    """The line on which the first statement that is not TOML begins: before it all is well, from there on nothing is."""
    low, high = 0, len(lines)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _error(lines[:middle]) is None else (low, middle)
    return high


def _explained(lines: Sequence[str], start: int, line: int, column: int, what: str) -> tuple[int, str]:
    """start: the line on which the statement begins; line, column, what: where tomllib stopped, and why."""
    own = lines[start - 1]
    if own.count('"""') % 2 or own.count("'''") % 2:
        mark = '"""' if own.count('"""') % 2 else "'''"
        return start, f"the text that begins with {mark} here is not closed; write {mark} at its end"
    if start < line:
        return _in_list(lines, start, line, column, what)
    if own.lstrip().startswith("["):
        return start, _header(lines, start, what)
    found = ASSIGNMENT.match(own)
    if found is None:
        return start, _no_assignment(own, lines[start:])
    if "overwrite" in what or "immutable" in what or "twice" in what:
        return start, _twice(lines, start, found["key"])
    value = found["value"]
    return start, _value(value, column - found.start("value"), what)


def _found(text: str) -> str:
    text = text.strip()
    return f"got `{text if len(text) <= LONGEST else text[: LONGEST - 3] + '...'}`"


def _in_list(lines: Sequence[str], start: int, line: int, column: int, what: str) -> tuple[int, str]:
    """In a list that goes over several lines."""
    at = lines[line - 1]
    if (line, column) >= (len(lines), len(lines[-1])) or HEADER.match(at) or ASSIGNMENT.match(at):
        return start, "the list that begins here is not closed; write ] after its last value"
    before = at[: column - 1].strip()
    if what == "Unclosed array" and not before.rstrip(","):
        line = next(
            n for n in range(line - 1, 0, -1) if lines[n - 1].strip() and not lines[n - 1].lstrip().startswith("#")
        )
        return line, _comma(_bare(lines[line - 1]))
    if what == "Unclosed array":
        return line, _comma(before)
    if at[column - 1 :].lstrip().startswith(","):
        return line, f"expected one comma, {_found(at)}; remove the other"
    return line, _value(at[column - 1 :].rstrip("], "), 0, what)


def _comma(before: str) -> str:
    last = re.findall(r'"(?:\\.|[^"\\])*"|\'[^\']*\'|[^\s,\[]+', before)
    return f"expected a comma after {last[-1] if last else 'a value'}; write one"


def _header(lines: Sequence[str], start: int, what: str) -> str:
    found = HEADER.match(lines[start - 1])
    if found is None:
        return f"expected a table's name in brackets, {_found(lines[start - 1])}; write it as in [lora]"
    name, opened, closed = found["name"], found["open"], found["close"]
    if len(closed) != len(opened):
        return f"the brackets around a table's name do not match, {_found(lines[start - 1])}; write {_table(name)}"
    first = _first(lines, start, name)
    if _table(name) != f"{opened}{name}{closed}":
        return f"{opened}{name}{closed} is allowed only once; write {_table(name)}, here{first and f' and in{first}'}"
    if "twice" in what or "overwrite" in what or "immutable" in what:
        if opened == "[[":
            return f"{name} is another kind of value{first and f' in{first}'}; write [[{name}]] there, too"
        return f"[{name}] is here a second time{first and f' (first in{first})'}; write its keys below the first one"
    return f"expected the name of a table, {_found(lines[start - 1])}; write it as in [lora]"


def _table(name: str) -> str:
    return "[[tokens]]" if name == "tokens" else f"[{name}]"


def _first(lines: Sequence[str], start: int, dotted: str) -> str:
    """ " line 3": where the same key or table stands above; "" where it cannot be told."""
    above = key_lines("\n".join(lines[: start - 1]))
    path = tuple(part.strip().strip("\"'") for part in dotted.split("."))
    table: tuple[str | int, ...] = ()
    for line in reversed(lines[: start - 1]):
        if (header := HEADER.match(line)) and not HEADER.match(lines[start - 1]):
            table = tuple(header["name"].split("."))
            break
    found = [line for where, line in above.items() if tuple(p for p in where if isinstance(p, str)) == (*table, *path)]
    return f" line {found[-1]}" if found else ""


def _twice(lines: Sequence[str], start: int, key: str) -> str:
    first = _first(lines, start, key)
    return f"{key} is here a second time{first and f' (first in{first})'}; remove one of them"


def _no_assignment(line: str, below: Sequence[str]) -> str:
    bare = line.strip()
    if bare == "---":
        return f"this looks like YAML, {_found(bare)}; {FORM}"
    entry = next((one for one in below if one.strip()), "")
    if (found := re.fullmatch(rf"(?P<key>{KEY})\s*:", _bare(bare))) and entry.startswith((" ", "\t", "- ")):
        return f"this looks like YAML, {_found(bare)}; write {_table(found['key'])}, and keys below it as rank = 16"
    if bare.startswith(("//", ";", "--", "/*", "<!--")):
        return f"expected # before a comment, {_found(bare)}; write # {bare.lstrip('/;-*<! ')}"
    if found := re.fullmatch(rf"(?P<key>{KEY})\s*:=?\s*(?P<value>.*)", bare):
        return f"expected = between key and value, {_found(bare)}; write {_pair(found['key'], found['value'])}"
    if bare.startswith(("{", "}", "- ")):
        return f"this looks like JSON or YAML, {_found(bare)}; write tables as [lora] and keys as rank = 16"
    if "=" in bare:
        return (
            f"expected the name of a key before =, {_found(bare)}; names have letters, digits, - and _, as in rank = 16"
        )
    if found := re.fullmatch(rf"(?P<key>{KEY})\s+(?P<value>.+)", bare):
        return f"expected = between key and value, {_found(bare)}; write {_pair(found['key'], found['value'])}"
    return f"expected a table or a key with its value, {_found(bare)}; write tables as [lora] and keys as rank = 16"


def _pair(key: str, value: str) -> str:
    """The line as it should be; a value that is none is a fault of its own and is put right with it."""
    value = _bare(value).strip().rstrip(",")
    return f"{key} = {_put_right(value)}"


def _put_right(word: str) -> str:
    if _is_value(word):
        return word
    word = word.rstrip(",; ")
    if _is_value(word):
        return word
    return WORDS.get(word) or _number(word) or _quoted(word.strip(TYPOGRAPHIC + "\"'"))


def _is_value(text: str) -> bool:
    return _error([f"a = {text}"]) is None


def _bare(text: str) -> str:
    """Less a comment behind it."""
    found = re.match(r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|[^"'#])*""", text)
    return found[0].rstrip() if found and found[0].strip() else text.rstrip()


def _quoted(text: str) -> str:
    """As TOML text that needs no escapes."""
    if "\\" in text:
        return f'"{text.replace(chr(92), "/")}"'
    return f"'{text}'" if '"' in text else f'"{text}"'


def _value(value: str, column: int, what: str) -> str:
    """Of what stands behind `=`, or in a list from the place where it goes wrong. column: of that place, from 1."""
    text = value.strip()
    if not _bare(text).strip() or text.startswith("#"):
        return "expected a value after =; write one, or remove the line"
    kinds: dict[str, Callable[[str, int, str], str]] = {'"': _double, "'": _single, "[": _list, "{": _inline}
    if text[0] in TYPOGRAPHIC or (
        text[0] in "\"'" and what.startswith(("Illegal", "Unterminated")) and text[-1:] in TYPOGRAPHIC
    ):
        inner = _bare(text).strip(TYPOGRAPHIC + "\"' ")
        return f"expected straight quotes, {_found(text)}; write {_quoted(inner)}"
    if message := _behind(_bare(text)):
        return message
    if text[0] in kinds:
        return kinds[text[0]](text, column - (len(value) - len(value.lstrip())), what)
    return _word(_bare(text).strip())


def _behind(text: str) -> str:
    """Of what does not belong behind a value that is well by itself; "" where there is no such thing."""
    value = text.rstrip(",; ")
    if value in NOTHING:
        return _word(value)
    if value and value != text and (_is_value(value) or value[0] not in "\"'[{="):
        mark = "semicolon" if ";" in text[len(value) :] else "comma"
        return f"expected no {mark} after a value, {_found(text)}; write {_put_right(value)}"
    if (found := re.fullmatch(rf"(?P<number>[\d.,_]+)\s*(?:{UNITS})", text)) and _is_number(found["number"]):
        return f"expected a number without its unit, {_found(text)}; write {_put_right(found['number'])}"
    found = re.fullmatch(VALUE, text)
    if not found or not (_is_value(found["value"]) or found["value"] in WORDS or _is_number(found["value"])):
        return ""
    value, rest = _put_right(found["value"]), found["rest"]
    if rest.startswith(COMMENTS) and not set(rest) & {'"', "'"}:
        return f"expected # before a comment, {_found(text)}; write {value} # {rest.strip('/;-*! ')}"
    if (following := rest.lstrip(",; ")) and ASSIGNMENT.match(following):
        return f"expected one key per line, {_found(text)}; write {value}, and on the next line {following}"
    return ""


def _is_number(text: str) -> bool:
    return bool(_number(text)) or (text[:1].isdigit() and _is_value(text))


def _double(text: str, column: int, what: str) -> str:
    if what.startswith(("Unescaped", "Invalid hex", "Escaped character")):
        return _backslash(text[1 : text.rfind('"')] if text.count('"') > 1 else text[1:])
    if what.startswith("Illegal character '\\n'") or what.startswith("Unterminated"):
        if text.endswith('\\"'):
            return _backslash(text[1:-1])
        return f'the text is not closed, {_found(text)}; write " at its end'
    if what.startswith("Illegal character"):
        return f"expected no control character in text, {_found(repr(text)[1:-1])}; remove it"
    inner = _bare(text).rstrip('"').lstrip('"')
    return f"the text ends before the line does, {_found(text)}; write '{inner}' in single quotes, or \\\" inside of it"


def _backslash(inner: str) -> str:
    found = _found(f'"{inner}"')
    if " " in inner.strip() and ":\\" not in inner and not inner.startswith("\\"):
        return f"a backslash in double quotes begins an escape like \\n, {found}; write '{inner}' in single quotes"
    slashes = inner.replace("\\", "/")
    return f"a backslash in double quotes begins an escape like \\n, {found}; write \"{slashes}\", or '{inner}' in single quotes"


def _single(text: str, column: int, what: str) -> str:
    inner = _bare(text).strip("'")
    if "'" in inner and '"' not in inner and "\\" not in inner:
        return f'the text ends before the line does, {_found(text)}; write "{inner}" in double quotes'
    return f"the text is not closed, {_found(text)}; write ' at its end"


def _list(text: str, column: int, what: str) -> str:
    before, rest = text[: column - 1], text[column - 1 :]
    if rest.lstrip().startswith(","):
        return f"expected one comma, {_found(text)}; remove the other"
    if what == "Unclosed array" and _bare(text).rstrip().endswith("]"):
        return _comma(before)
    if what == "Unclosed array" or not rest.strip():
        return f"the list is not closed, {_found(text)}; write ] after its last value"
    item = re.match(r'"(?:\\.|[^"\\])*"?|\'[^\']*\'?|[^,\]]+', rest)
    return _value(item[0] if item else rest, 0, what)


def _inline(text: str, column: int, what: str) -> str:
    return f'expected an inline table, {_found(text)}; write it as in {{ name = "TOK", vectors = 2 }}'


def _word(word: str) -> str:
    if word.startswith("="):
        return f"expected one =, {_found(f'={word}')}; write = {_put_right(word.lstrip('= '))}"
    if word in WORDS:
        return f"expected true or false, {_found(word)}; write {WORDS[word]}"
    if word in NOTHING:
        return f"TOML has no null value, {_found(word)}; for the default remove the line, or write # before it"
    if number := _number(word):
        return f"expected a number in TOML's form, {_found(word)}; write {number}"
    quoted = _quoted(word.strip(TYPOGRAPHIC + "\"'"))
    return (
        f"expected quotes around text, {_found(word)}; write {quoted if len(quoted) <= LONGEST else 'them around it'}"
    )


def _number(word: str) -> str:
    """The number that was meant, "" where none is to be seen."""
    if len(word) > 40:
        return ""
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", word) and not word.lstrip("+-").startswith("0"):
        return word.replace(",", "")
    if re.fullmatch(r"\d+(\.\d+)?\s*%", word):
        return f"{float(word.rstrip('% ')) / 100:g}"
    word = word.replace(",", ".", 1)
    found = re.fullmatch(r"([+-]?)(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d+))?f?", word)
    if not found or not (found[2] or found[3]):
        return ""
    whole = (found[2] or "0").lstrip("0") or "0"
    sign, part, power = found[1], found[3], found[4]
    return f"{sign}{whole}{f'.{part or 0}' if part is not None else ''}{f'e{power}' if power else ''}"
