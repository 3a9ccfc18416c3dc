"""Text files that people write (specs, captions, metadata). They must be UTF-8; the message names the encoding
found."""

from __future__ import annotations

import re
from pathlib import Path

# Byte order marks, the longer ones first: UTF-32's begins with UTF-16's. https://www.unicode.org/faq/utf_bom.html#bom4
MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
UTF8_MARK = b"\xef\xbb\xbf"
UTF8_ADVICE = "save the file as UTF-8"


class NotUtf8Error(ValueError):
    """A file that is not UTF-8. what: what it is instead; message: that and what to do; line: of the first bad byte,
    from 1.

    Neither names the file; the caller does.
    """

    def __init__(self, what: str, line: int = 1) -> None:
        self.what, self.message, self.line = what, f"{what}; {UTF8_ADVICE}", line
        super().__init__(self.message)


def read_user_text(path: Path) -> str:
    """A file's text, with "\\n" at the end of lines and without a byte order mark. Raises NotUtf8Error and OSError."""
    return decode_user_text(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def decode_user_text(raw: bytes) -> str:
    """The text in a file's bytes, without a byte order mark; line ends are kept. Raises NotUtf8Error."""
    for mark, encoding in MARKS:
        if raw.startswith(mark):
            raise NotUtf8Error(f"not UTF-8 but {encoding}")
    raw = raw.removeprefix(UTF8_MARK)
    if b"\x00" in raw:  # ASCII text in UTF-16 has one in each pair of bytes
        line = raw.count(b"\n", 0, raw.index(b"\x00")) + 1
        raise NotUtf8Error(f"not text in UTF-8 (found a zero byte on line {line}, as UTF-16 has)", line)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        if _looks_western(raw):
            letter = raw[error.start : error.start + 1].decode("cp1252")
            guess = f'but probably Windows-1252 or Latin-1 (found byte 0x{byte:02x} on line {line}, there "{letter}")'
        else:
            guess = f"(found byte 0x{byte:02x} on line {line})"
        raise NotUtf8Error(f"not UTF-8 {guess}", line) from error


def _looks_western(raw: bytes) -> bool:
    """Whether bytes are likely Windows-1252: accented letters stand alone, while Chinese, Japanese or Cyrillic text has
    runs."""
    runs = re.findall(rb"[\x80-\xff]+", raw)
    try:
        raw.decode("cp1252")
    except UnicodeDecodeError:
        return False
    return sum(map(len, runs)) < 1.5 * len(runs)
