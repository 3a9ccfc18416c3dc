"""What people write in another encoding than UTF-8 is named for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.core.user_text import NotUtf8Error, decode_user_text, read_user_text

WESTERN = (
    'not UTF-8 but probably Windows-1252 or Latin-1 (found byte 0xfc on line 2, there "ü"); save the file as UTF-8'
)


@pytest.mark.parametrize(
    ("raw", "line", "message"),
    [
        ("a für".encode("utf-16"), 1, "not UTF-8 but UTF-16; save the file as UTF-8"),
        (b"\xfe\xff" + "a".encode("utf-16-be"), 1, "not UTF-8 but UTF-16; save the file as UTF-8"),
        ("a".encode("utf-32"), 1, "not UTF-8 but UTF-32; save the file as UTF-8"),
        (
            "ab\ncd".encode("utf-16-le"),
            1,
            "not text in UTF-8 (found a zero byte on line 1, as UTF-16 has); save the file as UTF-8",
        ),
        ("one\nfür\n".encode("latin-1"), 2, WESTERN),
        ("one\nfür “quoted”\n".encode("cp1252"), 2, WESTERN),
        ("\n\n猫が好き".encode("shift-jis"), 3, "not UTF-8 (found byte 0x94 on line 3); save the file as UTF-8"),
        ("кот".encode("cp1251"), 1, "not UTF-8 (found byte 0xea on line 1); save the file as UTF-8"),
    ],
)
def test_another_encoding_is_named_with_its_line(raw: bytes, line: int, message: str) -> None:
    with pytest.raises(NotUtf8Error) as caught:
        decode_user_text(raw)
    assert (caught.value.line, caught.value.message) == (line, message)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "für\r\nzwei\rdrei\n".encode())
    assert read_user_text(tmp_path / "a.txt") == "für\nzwei\ndrei\n"
    assert decode_user_text(b"\xef\xbb\xbfa\r\n") == "a\r\n"
