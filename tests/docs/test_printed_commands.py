"""Every command that fluxrun tells somebody to type is one that it takes: in its messages, on its page, in its docs."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_lines import refusal
from tests.support.paths import PROJECT

SOURCES = sorted((PROJECT / "runner").rglob("*.py"))
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def spans(text: str) -> Iterator[list[str]]:
    """The commands between backticks."""
    for match in re.finditer(r"`(?:\S*/)?fluxrun ([^`]+)`", text):
        words = shlex.split(re.sub(r" N\b", " 1", " ".join(match[1].split())), comments=True)
        yield words[: words.index("<")] if "<" in words else words


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """Every string of a Python file, with X for what is put in. Only the docstrings of `runner/cli` are printed."""
    inside: set[int] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and file.parent.name != "cli" and node.body:
            inside |= {id(node.body[0].value)} if isinstance(node.body[0], ast.Expr) else set()
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def test_every_command_in_a_message_parses(tmp_path: Path) -> None:
    seen = []
    for file in SOURCES:
        for line, text in texts(file):
            for words in spans(text):
                if words == ["X"]:  # made by runner.core.command_line; what it makes is typed below
                    continue
                seen.append(words[0])
                assert (wrong := refusal(words, tmp_path)) is None, f"{file.name}:{line}: {shlex.join(words)}: {wrong}"
    assert {"plan", "check", "export", "queue"} <= set(seen)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_prose_of_a_page_parses(page: Path, tmp_path: Path) -> None:
    """Blocks are typed by test_docs."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for words in spans(prose):
        assert (wrong := refusal(words, tmp_path)) is None, f"{shlex.join(words)}: {wrong}"


def test_a_command_that_is_none_is_found(tmp_path: Path) -> None:
    assert refusal(["train", "a.toml"], tmp_path) == "no command train a.toml"
    assert refusal(["check", "--step"], tmp_path) == "Missing argument 'SPECS...'."
    assert refusal(["plan", "a.toml", "--rnus", "x"], tmp_path) is not None
    assert refusal(["cache", "prune", "--days", "3"], tmp_path) is None
    assert refusal(["plan"], tmp_path) is None
