"""What README and docs tell people to type, typed; the specs they show, planned; the keys, options and files they name.

In a ```sh block every `fluxrun` command is run on the tiny base, in order, in a folder as the docs have it (`world`); a
comment `exit code N` says how it ends. A ```console block needs what a test has not (a GPU, the hub, a second
terminal), so its commands are only parsed. A ```toml block is laid over a whole spec where it is a part of one, and
planned.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from runner.cli import main
from runner.spec.keys import spec_keys
from tests.support.house import PIVOTAL, House
from tests.support.markdown import Block, blocks
from tests.support.paths import PICTURES, PROJECT

GUIDES = sorted((PROJECT / "docs").glob("*.md"))
PAGES = [PROJECT / "README.md", *GUIDES]
BESIDE = [PROJECT / "CONTRIBUTING.md", PROJECT / "CHANGELOG.md"]
PREPARE = {"git", "cd", "python3.11", "pip"}  # typed once, before there is a fluxrun
SHELL = {"cp", "mv"}
FEWER = {
    "steps = 1200": "steps = 4",
    "steps = 300": "steps = 4",
    "batch_size = 8": "batch_size = 2",
    "steps = 20": "steps = 2",
}
WHOLE = """
[model]
base = "builtin:tiny"
max_sequence_length = 32
[data]
source = "my-pictures"
[train]
steps = 4
"""


def every(kind: str) -> list[Block]:
    found = [block for page in PAGES for block in blocks(page, kind)]
    assert found, f"no {kind} block"
    return found


def commands(block: Block) -> Iterator[tuple[list[str], int]]:
    """(words, the exit code told)"""
    for line in block.text.splitlines():
        told = re.search(r"# exit code (\d)$", line)
        words = shlex.split(line, comments=True)
        while "&&" in words:
            at = words.index("&&")
            yield words[:at], 0
            words = words[at + 1 :]
        if words:
            yield words, int(told[1]) if told else 0


def is_fluxrun(words: list[str]) -> bool:
    return Path(words[0]).name == "fluxrun"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the docs are: specs of a night that is done, `a` and `b`, and pictures. None changes it."""
    house = House(tmp_path_factory.mktemp("docs"))
    folder = house.folder
    (folder / "pictures").rename(folder / "my-pictures")
    night = folder / "night"
    night.mkdir()
    spec = PIVOTAL.replace('"pictures"', '"../my-pictures"').replace(
        "center_crop = true", "center_crop = true\nholdout = 2"
    )
    (night / "a.toml").write_text(spec)
    (night / "b.toml").write_text('extends = "a.toml"\n[lora]\nrank = 8\n')
    (folder / "base.toml").write_text(WHOLE)
    shutil.copytree(PROJECT / "specs", folder / "specs")
    (folder / "docs").mkdir()
    for path in (*(folder / "specs").glob("*.toml"), PROJECT / "docs" / "first-comparison.toml"):
        text = path.read_text()
        for long, short in FEWER.items():
            text = re.sub(rf"^{long}$", short, text, flags=re.M)
        (folder / path.relative_to(PROJECT if path.is_relative_to(PROJECT) else folder)).write_text(text)
    said = house.fluxrun("queue", "night")
    assert said.code == 0, said.err
    return folder


@pytest.fixture
def world(trained: Path, tmp_path: Path) -> House:
    house = House.__new__(House)
    house.folder = tmp_path / "world"
    shutil.copytree(trained, house.folder)
    return house


# ---- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_to_type_works(page: Path, world: House) -> None:
    for block in blocks(page, "sh"):
        for words, code in commands(block):
            if is_fluxrun(words):
                said = world.fluxrun(*words[1:])
                assert said.code == code, f"{block}: {shlex.join(words)} ends with {said.code}\n{said.out}{said.err}"
            elif words[0] in SHELL:
                subprocess.run(words, cwd=world.folder, check=True)
            else:
                assert Path(words[0]).name in PREPARE, f"{block}: {words[0]} is not run here; mark the block `console`"


def test_what_cannot_be_run_here_parses(world: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    seen = set()
    for block in every("console"):
        for words, _ in commands(block):
            words = words[: words.index("<")] if "<" in words else words
            if is_fluxrun(words):
                seen.add(words[1])
                try:
                    main.commands[words[1]].make_context(words[1], words[2:])
                except (KeyError, click.ClickException) as error:
                    pytest.fail(f"{block}: {shlex.join(words)}: {error!r}")
    assert {"stop", "board", "queue"} <= seen


def test_a_newcomers_six_commands() -> None:
    """From a clone to the first comparison. Those before there is a fluxrun are the README's own, which CI types."""
    typed = [words for words, _ in commands(blocks(PROJECT / "docs" / "first-run.md", "sh")[0])]
    assert len(typed) <= 6
    assert [words[0] for words in typed[:2]] == ["git", "cd"]
    [first, _] = re.findall(r"^    (python3.11 -m venv .*)$", (PROJECT / "README.md").read_text(), re.M)
    assert first.startswith(" && ".join(shlex.join(words) for words in typed[2:4]))
    assert [words[:2] for words in typed[4:]] == [[".venv/bin/fluxrun", "queue"], [".venv/bin/fluxrun", "compare"]]
    assert (PROJECT / typed[4][2]).is_file()


def test_the_comparison_shows_what_it_promises(world: House) -> None:
    """Read on the night that is there already: what differs, the held-out loss nine times, a picture."""
    said = world.fluxrun("compare", "a", "b", "--out", "first.png")
    assert "lora.rank" in said.out
    assert "noise levels" in said.out
    assert (world.folder / "first.png").is_file()


def test_a_night_moved_with_its_specs_is_still_done(world: House) -> None:
    """resuming.md: a run knows its pictures by what they hold. The old folders are gone."""
    moved = world.folder.parent / "elsewhere"
    world.folder.rename(moved)
    (moved / "runs").rename(moved / "other-runs")
    shutil.rmtree(moved / "other-runs" / "cache")
    world.folder = moved
    said = world.fluxrun("queue", "night", "--runs", "other-runs")
    assert said.code == 0, said.err
    assert said.err.count("skipped, done") == 2


# ---- specs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", every("toml"), ids=str)
def test_a_spec_on_a_page_plans(block: Block, tmp_path: Path) -> None:
    house = House.__new__(House)
    house.folder = tmp_path
    shutil.copytree(PICTURES, tmp_path / "my-pictures")
    if re.search("^prompt = ", block.text, re.M):  # it is the caption of what has none
        for caption in (tmp_path / "my-pictures").glob("*.txt"):
            caption.unlink()
    for name in ("base.toml", "mere.toml"):
        (tmp_path / name).write_text(WHOLE)
    head = "" if "extends" in block.text else 'extends = "mere.toml"\n'
    (tmp_path / "shown.toml").write_text(head + block.text)
    said = house.fluxrun("plan", "shown.toml", "--json")
    planned = json.loads(said.out)
    assert planned["errors"] == [], str(block)
    assert planned["runs"]


# ---- names ---------------------------------------------------------------------------------------------------------


KEYS = spec_keys()
TABLES = {key.rpartition(".")[0] for key in KEYS if "." in key} | {"sweep"}


def spans(page: Path) -> Iterator[str]:
    """What stands in backticks, outside of blocks."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return (match[1] for match in re.finditer(r"`([^`\n]+)`", prose))


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.name)
def test_every_key_that_is_named_is_one(page: Path) -> None:
    for span in spans(page):
        dotted = re.match(r"([a-z_]+(?:\.[a-z_0-9]+)+)(?: = .*)?$", span)
        if dotted and dotted[1].split(".")[0] in TABLES:
            assert dotted[1] in KEYS or dotted[1] in TABLES, f"{page.name}: `{span}`"
        table = re.match(r"\[\[?([a-z_.]+)\]\]?$", span)
        if table and table[1] != "trigger":
            assert table[1] in TABLES, f"{page.name}: `{span}`"


def test_the_key_reference_is_what_its_tool_writes() -> None:
    sys.path.insert(0, str(PROJECT / "tools"))
    try:
        import key_reference
    finally:
        sys.path.pop(0)
    assert key_reference.PAGE.read_text() == key_reference.page(), "run `python tools/key_reference.py`"
    rows = re.findall(r"^\| `([\w.]+)` \|", key_reference.page(), re.M)
    assert sorted(rows) == sorted(set(KEYS) - TABLES)


def typed(page: Path) -> Iterator[str]:
    """Everything that looks like a fluxrun command: in prose, in blocks, indented."""
    yield from spans(page)
    yield from (line.strip() for line in page.read_text().splitlines() if re.search(r"(^|/)fluxrun \w", line.strip()))


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.name)
def test_every_command_and_option_that_is_named_is_one(page: Path) -> None:
    known = {option for command in main.commands.values() for one in command.params for option in one.opts}
    for text in typed(page):
        match = re.search(r"(?:^|/|\b)fluxrun ([a-z-]+)\b(.*)", text) or re.match(r"([a-z-]+) (--.*)", text)
        if match and match[1] in main.commands:
            options = {option for one in main.commands[match[1]].params for option in one.opts}
            unquoted = re.sub(r"\".*?\"|'.*?'|#.*|`.*", "", match[2])
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", unquoted):
                assert option in options, f"{page.name}: {text}: no {option}"
        elif match and "fluxrun " in text:
            pytest.fail(f"{page.name}: {text}: no command {match[1]}")
        elif (bare := re.match(r"(--[a-z][a-z-]*)( [A-Z]+)?$", text)) and page.name != "coming-from.md":
            assert bare[1] in known | {"--all"}, f"{page.name}: no command has {bare[1]}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert there.is_relative_to(PROJECT), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def test_the_readme_leads_to_every_guide_and_pages_are_short() -> None:
    readme = (PROJECT / "README.md").read_text()
    assert len(GUIDES) >= 9
    for page in GUIDES:
        assert f"(docs/{page.name})" in readme, page.name
        lines = page.read_text().count("\n")
        assert lines <= 120 or page.name == "keys.md", f"{page.name} has {lines} lines"
    assert (PROJECT / "CONTRIBUTING.md").read_text().count("\n") < 40
