"""docs/architecture.md: every package, file and import that it shows is there, and none is missing."""

from __future__ import annotations

import ast
import re

from tests.support.paths import PROJECT

PAGE = (PROJECT / "docs" / "architecture.md").read_text()
RUNNER = PROJECT / "runner"
PACKAGES = {path.parent.name for path in RUNNER.glob("*/__init__.py")}


def imports_between_packages() -> set[tuple[str, str]]:
    """(importing, imported), by the files' import statements, those inside functions included."""
    pairs = set()
    for path in RUNNER.rglob("*.py"):
        package = path.relative_to(RUNNER).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if package in PACKAGES and module.startswith("runner."):
                pairs.add((package, module.split(".")[1]))
    return {(above, below) for above, below in pairs if above != below}


def reachable(graph: set[tuple[str, str]], start: str) -> set[str]:
    """Every package that `start` imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        above = waiting.pop()
        below = {right for left, right in graph if left == above} - found
        found |= below
        waiting += below
    return found


def without_implied(graph: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The graph without the imports that follow from others."""
    return {pair for pair in graph if pair[1] not in reachable(graph - {pair}, pair[0])}


def test_the_drawn_imports_are_the_real_ones() -> None:
    drawn = set(re.findall(r"^    (\w+) --> (\w+)$", PAGE, re.M))
    assert drawn == without_implied(imports_between_packages())


def test_every_package_has_its_row() -> None:
    rows = re.findall(r"^\| \d+ \| `(\w+)` \|", PAGE, re.M)
    assert sorted(rows) == sorted(PACKAGES)


def test_every_file_that_is_named_is_there() -> None:
    named = {
        name for name in re.findall(r"`([a-z_0-9]+/[a-z_0-9/]+(?:\.py|/)?)`", PAGE) if name.split("/")[0] in PACKAGES
    }
    assert len(named) > 20
    missing = [name for name in sorted(named) if not (RUNNER / name).exists()]
    assert not missing, missing
