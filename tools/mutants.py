"""Puts each mistake of tests/mutants.toml into a copy of the project and runs the tests that must notice it.

    python tools/mutants.py [--ids ID ...] [--jobs 2] [--no-baseline]

Prints a line a mistake: killed, SURVIVED, or NOT APPLIED (its text does not stand in the file exactly once). First the named
tests run without any mistake: a test that fails anyway notices nothing. The exit code is 1 if one survived, was not applied,
or could not be tried.

mutmut and cosmic-ray make mistakes of their own by rules and try each with one command or with all tests that reach it;
neither takes a mistake as text, with the tests that must notice this one.
"""

from __future__ import annotations

import argparse
import ast
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
LIST = PROJECT / "tests" / "mutants.toml"
LIMIT = 300.0  # seconds for a mistake's tests; one that makes them hang is noticed too
NO_TESTS = (2, 4, 5)  # pytest: stopped while collecting, usage error, nothing collected


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in `file`, becomes `new`; each of `tests` (pytest's ids) must then fail."""

    id: str
    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_list(path: Path) -> list[Mutant]:
    """Raises ValueError for an id that stands twice, and for a mistake without tests."""
    found = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in tomllib.loads(path.read_text())["mutant"]]
    ids = [one.id for one in found]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"{path}: these ids stand there twice: {', '.join(twice)}")
    if bare := [one.id for one in found if not one.tests]:
        raise ValueError(f"{path}: these name no test: {', '.join(bare)}")
    return found


def copy_tree(target: Path) -> Path:
    """What git tracks or would add, as it is now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, capture_output=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (PROJECT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, target / name)
    return target


def pytest(tree: Path, tests: Sequence[str], *more: str) -> tuple[int | None, str]:
    """Its exit code, None after LIMIT seconds, and what it printed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=line",
        "-rf",
        "-m",
        "",
        *more,
        *tests,
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        said, _ = process.communicate()
        return None, said
    return process.returncode, said


def failures(said: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.M)


def verdict(tree: Path, mutant: Mutant) -> tuple[bool, str]:
    """Whether it was noticed, and how that is told. The copy is as it was afterwards."""
    path = tree / mutant.file
    text = path.read_text() if path.is_file() else ""
    if text.count(mutant.old) != 1:
        return False, f"NOT APPLIED: {mutant.file} has its text {text.count(mutant.old)} times"
    changed = text.replace(mutant.old, mutant.new)
    if mutant.file.endswith(".py"):
        try:
            ast.parse(changed)
        except SyntaxError as error:
            return False, f"NOT APPLIED: no Python any more ({error})"
    path.write_text(changed)
    try:
        code, said = pytest(tree, mutant.tests, "-n", "0", "-x")
    finally:
        path.write_text(text)
    if code == 0:
        return False, "SURVIVED"
    if code in NO_TESTS:
        return False, f"NOT TRIED: {' '.join(said.split()[-40:])}"
    by = failures(said)
    return True, f"killed by {by[0] if by else 'a time limit' if code is None else f'exit code {code}'}"


def baseline(tests: Sequence[str], jobs: int) -> list[str]:
    """Those that fail without any mistake."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        code, said = pytest(copy_tree(Path(folder)), tests, "-n", str(jobs))
    return [] if code == 0 else failures(said) or [" ".join(said.split()[-60:])]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ids", nargs="*", default=[], help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="mistakes at a time")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a mistake first")
    given = parser.parse_args()
    mutants = read_list(LIST)
    if unknown := sorted(set(given.ids) - {one.id for one in mutants}):
        parser.error(f"{LIST} has no {', '.join(unknown)}")
    chosen = [one for one in mutants if not given.ids or one.id in given.ids]
    tests = list(dict.fromkeys(test for one in chosen for test in one.tests))
    began = time.monotonic()
    if not given.no_baseline and (failing := baseline(tests, given.jobs)):
        print(f"these fail without any mistake: {', '.join(failing)}")
        return 1
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for one in chosen:
        waiting.put(one)
    missed: list[str] = []

    def work() -> None:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            tree = copy_tree(Path(folder))
            while True:
                try:
                    one = waiting.get_nowait()
                except queue.Empty:
                    return
                start = time.monotonic()
                noticed, told = verdict(tree, one)
                if not noticed:
                    missed.append(one.id)
                print(f"{one.id:20} {time.monotonic() - start:4.0f} s  {told}  ({one.what})", flush=True)

    workers = [threading.Thread(target=work) for _ in range(given.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    noticed = len(chosen) - len(missed)
    print(
        f"{noticed} of {len(chosen)} noticed in {time.monotonic() - began:.0f} s; not: {' '.join(sorted(missed)) or 'none'}"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
