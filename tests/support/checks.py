"""`fluxrun check`, read back by level."""

from __future__ import annotations

from pathlib import Path

from tests.support.house import House


def report(house: House, *arguments: str | Path) -> tuple[int, dict[str, list[str]]]:
    """(exit code, what was found by level); the folder's own path is left out of it."""
    said = house.fluxrun("check", *arguments)
    found: dict[str, list[str]] = {"error": [], "warning": [], "note": []}
    last = ""
    for line in said.out.replace(f"{house.folder}/", "").splitlines()[:-1]:
        if line.startswith("    "):
            found[last][-1] += f"\n{line[4:]}"
        else:
            last, _, rest = line.partition(": ")
            found[last].append(rest)
    return said.code, found
