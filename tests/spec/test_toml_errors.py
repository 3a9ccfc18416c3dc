"""Specs that are not TOML, or not UTF-8: the right line, and what to type, which is then typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.spec.toml_errors import toml_faults
from tests.support.house import House

SPEC = """\
seed = 1
[model]
base = "builtin:tiny"
max_sequence_length = 32
[data]
source = "pictures"
center_crop = true
resolution = 64
[[tokens]]
name = "TOK"
[lora]
rank = 4
[train]
steps = 4
batch_size = 2
[validate]
prompts = [
  "a TOK",
  "two TOK",
]
"""

# name -> (what stands there, what is typed instead, its line, what is said)
WRONG: dict[str, tuple[str, str, int, str]] = {
    "True": (
        "center_crop = true",
        "center_crop = True",
        7,
        "expected true or false, got `True`; write true",
    ),
    "None": (
        "seed = 1",
        "seed = None",
        1,
        "TOML has no null value, got `None`; for the default remove the line, or write # before it",
    ),
    "unquoted": (
        'base = "builtin:tiny"', "base = builtin:tiny", 3,
        'expected quotes around text, got `builtin:tiny`; write "builtin:tiny"',
    ),
    "smart quotes": ('name = "TOK"', "name = \u201cTOK\u201d", 10, "expected straight quotes, got `\u201cTOK\u201d`; write \"TOK\""),
    "half smart quotes": ('name = "TOK"', 'name = "TOK\u201d', 10, "expected straight quotes, got `\"TOK\u201d`; write \"TOK\""),
    "not closed": ('name = "TOK"', 'name = "TOK', 10, 'the text is not closed, got `"TOK`; write " at its end'),
    "a colon": ("rank = 4", "rank: 4", 12, "expected = between key and value, got `rank: 4`; write rank = 4"),
    "no equals": ("rank = 4", "rank 4", 12, "expected = between key and value, got `rank 4`; write rank = 4"),
    "two equals": ("rank = 4", "rank == 4", 12, "expected one =, got `== 4`; write = 4"),
    "no value": ("rank = 4", "rank =", 12, "expected a value after =; write one, or remove the line"),
    "a decimal comma": ("rank = 4", "dropout = 0,5", 12, "expected a number in TOML's form, got `0,5`; write 0.5"),
    "no zero": ("rank = 4", "dropout = .5", 12, "expected a number in TOML's form, got `.5`; write 0.5"),
    "a thousand": ("steps = 4", "steps = 1,000", 14, "expected a number in TOML's form, got `1,000`; write 1000"),
    "a leading zero": ("steps = 4", "steps = 04", 14, "expected a number in TOML's form, got `04`; write 4"),
    "a missing comma": ('  "a TOK",', '  "a TOK"', 18, 'expected a comma after "a TOK"; write one'),
    "two commas": ('  "a TOK",', '  "a TOK",,', 18, 'expected one comma, got `"a TOK",,`; remove the other'),
    "no bracket": ("]\n", "", 17, "the list that begins here is not closed; write ] after its last value"),
    "a header's bracket": ("[lora]", "[lora", 11, "the brackets around a table's name do not match, got `[lora`; write [lora]"),
    "a comment": ("seed = 1", "// seed = 1", 1, "expected # before a comment, got `// seed = 1`; write # seed = 1"),
    "twice": (
        "batch_size = 2",
        "batch_size = 2\nsteps = 8",
        16,
        "steps is here a second time (first in line 14); remove one of them",
    ),
    "a table twice": (
        "[validate]",
        "[lora]\nalpha = 4\n[validate]",
        16,
        "[lora] is here a second time (first in line 11); write its keys below the first one",
    ),
    "tokens twice": (
        "[[tokens]]\nname = \"TOK\"\n",
        "[tokens]\nname = \"TOK\"\n[tokens]\nname = \"TOK2\"\n",
        11,
        "[tokens] is allowed only once; write [[tokens]], here and in line 9",
    ),
    "a Windows path": (
        'source = "pictures"',
        'source = "C:\\Users\\me\\pics"',
        6,
        "a backslash in double quotes begins an escape like \\n, got `\"C:\\Users\\me\\pics\"`; "
        "write \"C:/Users/me/pics\", or 'C:\\Users\\me\\pics' in single quotes",
    ),
    "a path's last backslash": (
        'source = "pictures"',
        'source = "pictures\\"',
        6,
        "a backslash in double quotes begins an escape like \\n, got `\"pictures\\\"`; "
        "write \"pictures/\", or 'pictures\\' in single quotes",
    ),
    "quotes in text": (
        'name = "TOK"',
        'initializer = "a "red" dog"\nname = "TOK"',
        10,
        "the text ends before the line does, got `\"a \"red\" dog\"`; write 'a \"red\" dog' in single quotes, or \\\" inside of it",
    ),
    "a comma behind a number": ("rank = 4", "rank = 4,", 12, "expected no comma after a value, got `4,`; write 4"),
    "a comma behind text": ('name = "TOK"', 'name = "TOK",', 10, 'expected no comma after a value, got `"TOK",`; write "TOK"'),
    "a comma behind True": ("center_crop = true", "center_crop = True,", 7, "expected no comma after a value, got `True,`; write true"),
    "a semicolon": ("seed = 1", "seed = 1;", 1, "expected no semicolon after a value, got `1;`; write 1"),
    "a comment behind a number": ("rank = 4", "rank = 4 // small", 12, "expected # before a comment, got `4 // small`; write 4 # small"),
    "a comment behind text": ('name = "TOK"', 'name = "TOK" -- my', 10, 'expected # before a comment, got `"TOK" -- my`; write "TOK" # my'),
    "two keys on a line": (
        "rank = 4",
        "rank = 4 alpha = 1",
        12,
        "expected one key per line, got `4 alpha = 1`; write 4, and on the next line alpha = 1",
    ),
    "a unit": ("resolution = 64", "resolution = 64px", 8, "expected a number without its unit, got `64px`; write 64"),
    "YAML": (
        "[lora]\nrank = 4",
        "lora:\n  rank: 4",
        11,
        "this looks like YAML, got `lora:`; write [lora], and keys below it as rank = 16",
    ),
    "YAML's first line": (
        "seed = 1",
        "---\nseed: 1",
        1,
        "this looks like YAML, got `---`; write tables as [lora], keys as rank = 16, and text in quotes",
    ),
}  # fmt: skip
# What is typed where the advice says it: the whole line, or the part behind "write" (see `followed`).
FOLLOWED: dict[str, str] = {
    "None": "# seed = None",
    "not closed": 'name = "TOK"',
    "two equals": "rank = 4",
    "no value": "rank = 4",
    "a missing comma": '  "a TOK",',
    "two commas": '  "a TOK",',
    "no bracket": "]\n",
    "twice": "batch_size = 2",
    "a table twice": "[validate]",
    "tokens twice": '[[tokens]]\nname = "TOK"\n[[tokens]]\nname = "TOK2"\n',
    "a Windows path": 'source = "C:/Users/me/pics"',
    "a path's last backslash": 'source = "pictures/"',
    "two keys on a line": "rank = 4\nalpha = 1",
    "YAML": "[lora]\nrank = 4",
    "YAML's first line": "seed = 1",
    "quotes in text": 'initializer = \'a "red" dog\'\nname = "TOK"',
}


def faulty(name: str) -> str:
    right, wrong, _, _ = WRONG[name]
    assert right in SPEC
    return SPEC.replace(right, wrong, 1) if name != "no bracket" else SPEC.rstrip().removesuffix("]")


def followed(name: str) -> str:
    """The spec after what the message says was typed."""
    right, wrong, _, said = WRONG[name]
    advice = said.rpartition("write ")[2]
    line = FOLLOWED.get(name)
    if line is None:
        key, equals, _ = wrong.partition(" =")
        line = advice if wrong[0] in "[/" or " = " in advice else f"{key}{equals} {advice}"
    return SPEC.replace(right, line, 1) if name != "no bracket" else faulty(name) + line


@pytest.mark.parametrize("name", WRONG)
def test_broken_toml_is_reported_with_its_line_and_a_fix(house: House, name: str) -> None:
    _, _, line, said = WRONG[name]
    told = house.fluxrun("plan", house.write("a.toml", faulty(name)))
    assert told.code == 2
    first, last = told.err.splitlines()
    assert first == f"{house.folder}/a.toml:{line}: not TOML: {said}"
    assert last == "1 fault; nothing was started"
    assert not list(toml_faults(followed(name))), "the advice does not mend it"
    if name not in ("a Windows path", "tokens twice"):  # no such folder here; no caption names the second token
        mended = house.fluxrun("plan", house.write("a.toml", followed(name)))
        assert mended.code == 0, mended.err


def test_several_syntax_faults_are_reported_at_once(house: House) -> None:
    text = SPEC.replace("true", "True").replace("rank = 4", "rank: 4").replace('"builtin:tiny"', "tiny")
    said = house.fluxrun("plan", house.write("a.toml", text.replace("rank: 4", "rank = 04")))
    assert [line.split(": ")[0].rpartition(":")[2] for line in said.err.splitlines()[:-1]] == ["3", "7", "12"]
    assert said.err.splitlines()[-1] == "3 faults; nothing was started"


def test_a_secret_in_a_line_that_is_not_toml_is_not_shown(house: House) -> None:
    lines = (
        "token = hf_abcdefgh",
        'token: "hf_abcdefgh"',
        "[hub]\ntoken = hf_abcdefgh # mine",
        "hub.token = mine it is",
        "wandb_api_key = mine",
        "rank = 4 password = mine",
    )
    for line in lines:
        said = house.fluxrun("plan", house.write("a.toml", f"{SPEC}{line}\n"))
        assert "hf_" not in said.err
        assert "mine" not in said.err
        assert "this line does not parse (not shown" in said.err


def test_many_syntax_faults_are_bounded_in_time_and_length() -> None:
    assert len(toml_faults("a = True\n" * 30)) == 20
    assert len(toml_faults("\n".join(f"a{number} = True" for number in range(20_000)))) == 1
    [(line, said)] = toml_faults(f"x = {'9' * 5000}\n")
    assert line == 1
    assert len(said) < 300


# ---- encodings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (SPEC.encode("utf-16"), "1: not UTF-8 but UTF-16; save the file as UTF-8"),
        (
            SPEC.replace("[lora]", "# caf\u00e9\n[lora]").encode("latin-1"),
            '11: not UTF-8 but probably Windows-1252 or Latin-1 (found byte 0xe9 on line 11, there "\u00e9"); save the file as '
            "UTF-8",
        ),
    ],
)
def test_an_encoding_that_is_not_utf8_is_named_with_its_line(house: House, raw: bytes, said: str) -> None:
    (house.folder / "base.toml").write_bytes(raw)
    for spec in ("base.toml", house.write("a.toml", 'extends = "base.toml"\n')):
        told = house.fluxrun("plan", spec)
        assert told.code == 2
        assert told.err.splitlines()[0].endswith(f"base.toml:{said}")


def test_a_byte_order_mark_is_read_in_a_spec_and_in_what_it_extends(house: House) -> None:
    (house.folder / "base.toml").write_text(SPEC, encoding="utf-8-sig")
    (house.folder / "a.toml").write_text('extends = "base.toml"\n', encoding="utf-8-sig")
    for spec in ("base.toml", "a.toml"):
        assert house.fluxrun("plan", spec).code == 0
    (house.folder / "a.toml").write_text('extends = "base.toml"\nsede = 2\n', encoding="utf-8-sig")
    assert house.fluxrun("plan", "a.toml").err.startswith("a.toml:2: sede: unknown key, got sede = 2")


def test_line_numbers_are_right_with_windows_line_ends_and_a_mark(house: House) -> None:
    raw = SPEC.replace("rank = 4", "rnk = 4").replace("\n", "\r\n").encode("utf-8-sig")
    (house.folder / "a.toml").write_bytes(raw)
    assert house.fluxrun("plan", "a.toml").err.startswith("a.toml:12: lora.rnk: unknown key, got rnk = 4")


@pytest.mark.parametrize(
    ("typed", "read", "escape"),
    [
        (r"C:\new\train", r"C:\new\train", r"\n"),
        (r"C:\train", r"C:\train", r"\t"),
        (r"D:\bilder", r"D:\x08ilder", r"\b"),
    ],
)
def test_a_windows_path_with_valid_escapes_is_noticed(house: House, typed: str, read: str, escape: str) -> None:
    """`"C:\\new"` is valid TOML: a line break stands in it."""
    said = house.fluxrun("plan", house.write("a.toml", SPEC.replace('"pictures"', f'"{typed}"')))
    slashes = typed.replace("\\", "/")
    assert said.err.splitlines()[0] == (
        f"{house.folder}/a.toml:6: data.source: expected text on one line, got '{read}'; in double quotes {escape} is a "
        f"control character, not the backslash of a path; write \"{slashes}\", or '{typed}' (folder of images (captions in "
        "NAME.txt), imagefolder, or hub data set)"
    )
    for mended in (f'"{slashes}"', f"'{typed}'"):
        said = house.fluxrun("plan", house.write("a.toml", SPEC.replace('"pictures"', mended)))
        assert "data.source: no such folder" in said.err, "read as a path, which is not here"


def test_a_spec_that_cannot_be_opened_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    said = house.fluxrun("plan", house.folder / "none.toml")
    assert said.err.startswith(f"{house.folder}/none.toml:1: no such file; a SPEC is a TOML file, or a folder of them")
    house.write("a.toml", SPEC)

    def closed(_: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("runner.spec.extends.read_user_text", closed)
    said = house.fluxrun("plan", "a.toml")
    assert said.err.startswith("a.toml:1: cannot be read (Permission denied); name a TOML file that you may read")
