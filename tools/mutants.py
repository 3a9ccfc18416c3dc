"""Puts each mistake of tests/mutants.toml into a copy of the project and runs the tests that must notice it.

    python tools/mutants.py [--ids ID ...] [--jobs 2] [--no-baseline]
    python tools/mutants.py --sample 12 [--seed 1]

The second draws so many mistakes of its own (tools/mistakes.py) for each file under `sample` in the list, and runs the
tests that stand there: what survives shows what the list forgets, or changes nothing that can be seen.

Prints a line a mistake: killed, SURVIVED, or NOT APPLIED (its text does not stand in the file exactly once). First the
named tests run without any mistake: a test that fails anyway notices nothing. The exit code is 1 if one survived, was
not applied, or could not be tried.

mutmut and cosmic-ray try each mistake with one command or with all tests that reach it; neither takes a mistake as
text, with the tests that must notice this one.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mistakes import draw

PROJECT = Path(__file__).resolve().parent.parent
LIST = PROJECT / "tests" / "mutants.toml"
LIMIT = 120.0  # seconds for a mistake's tests; one that makes them hang is noticed too
SAMPLE_LIMIT = 300.0  # for a drawn one's, which are more
NO_TESTS = (2, 3, 4, 5)  # pytest: stopped while collecting, an error of its own, wrong ids, nothing collected
# Imported once, before the tests' processes are forked: it would take each of them longer than its tests.
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "pydantic", "hypothesis", "prodigyopt", "tensorboard", "PIL.Image",
             "diffusers.pipelines.flux.pipeline_flux", "transformers.models.clip.modeling_clip",
             "transformers.models.t5.modeling_t5", "peft.tuners.lora.layer")  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in `file`, becomes `new`; `tests` (pytest's ids) must then fail."""

    id: str
    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass
class Copy:
    """A copy of the project, and the process that runs tests in it, if one does. `text`: of the file with the mistake,
    without it."""

    tree: Path
    mutant: Mutant | None = None
    text: str = ""
    pid: int = 0
    began: float = 0.0
    told: Path = field(default_factory=Path)


def read_list(path: Path) -> list[Mutant]:
    """Raises ValueError for an id that stands twice, and for a mistake without tests."""
    found = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in tomllib.loads(path.read_text())["mutant"]]
    ids = [one.id for one in found]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"{path}: these ids stand there twice: {', '.join(twice)}")
    if bare := [one.id for one in found if not one.tests]:
        raise ValueError(f"{path}: these name no test: {', '.join(bare)}")
    return found


def read_sample(path: Path, count: int, seed: int) -> list[Mutant]:
    """So many mistakes for each file of the list's `sample`; `old` and `new` are whole files."""
    found = []
    for name, tests in tomllib.loads(path.read_text())["sample"].items():
        text = (PROJECT / name).read_text()
        for number, one in enumerate(draw(text, count, f"{seed} {name}"), 1):
            what = f"{name}:{one.line}, {one.kind}: {one.old} -> {one.new}"
            found.append(Mutant(f"{Path(name).stem}-{number}", name, what, text, one.text, tuple(tests)))
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


def import_libraries() -> None:
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    sys.dont_write_bytecode = True
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()


def start(copy: Copy, tests: Sequence[str], *more: str) -> None:
    """Run tests in a process of their own, whose output goes into a file."""
    copy.told, copy.began = copy.tree / ".told", time.monotonic()
    copy.pid = os.fork()
    if copy.pid:
        return
    try:
        os.setsid()
        handle = os.open(copy.told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(copy.tree)
        os.environ["PYTHONPATH"] = str(copy.tree)
        sys.path[:] = [
            str(copy.tree),
            *(place for place in sys.path if Path(place or ".").resolve() != PROJECT / "tools"),
        ]
        import pytest

        options = ["-q", "-p", "no:cacheprovider", "--tb=line", "-rf", "-m", "", *more]
        code = int(pytest.main([*options, *tests]))
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - whatever it is, this process is only the tests'
        code = 3
    os._exit(code)


def ended(copy: Copy, limit: float) -> tuple[int | None, str] | None:
    """The tests' exit code (None: they took too long) and output; None while they run."""
    pid, status = os.waitpid(copy.pid, os.WNOHANG)
    if not pid:
        if time.monotonic() - copy.began < limit:
            return None
        os.killpg(copy.pid, signal.SIGKILL)
        os.waitpid(copy.pid, 0)
        return None, copy.told.read_text(errors="replace")
    return os.waitstatus_to_exitcode(status), copy.told.read_text(errors="replace")


def apply(copy: Copy, mutant: Mutant) -> str:
    """Put a mistake in; what is wrong with it, if it cannot be."""
    path = copy.tree / mutant.file
    text = path.read_text() if path.is_file() else ""
    if text.count(mutant.old) != 1:
        return f"NOT APPLIED: {mutant.file} has its text {text.count(mutant.old)} times"
    changed = text.replace(mutant.old, mutant.new)
    if mutant.file.endswith(".py"):
        try:
            ast.parse(changed)
        except SyntaxError as error:
            return f"NOT APPLIED: no Python any more ({error})"
    path.write_text(changed)
    copy.mutant, copy.text = mutant, text
    return ""


def verdict(code: int | None, said: str) -> tuple[bool, str]:
    """Whether the mistake was noticed, and how that is told."""
    if code == 0:
        return False, "SURVIVED"
    if code in NO_TESTS:
        return False, f"NOT TRIED: {' '.join(said.split()[-40:])}"
    by = failures(said)
    return True, f"killed by {by[0] if by else 'a time limit' if code is None else f'exit code {code}'}"


def failures(said: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.M)


def baseline(copy: Copy, tests: Sequence[str], jobs: int) -> list[str]:
    """Those that fail without any mistake."""
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
        "-n",
        str(jobs),
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy.tree)}
    done = subprocess.run([*command, *tests], cwd=copy.tree, env=environment, capture_output=True, text=True)
    return [] if done.returncode == 0 else failures(done.stdout) or [" ".join(done.stdout.split()[-60:])]


def try_all(mutants: Sequence[Mutant], copies: Sequence[Copy], limit: float) -> list[str]:
    """The ids of those that were not noticed."""
    waiting, missed = list(mutants), list[str]()

    def tell(mutant: Mutant, noticed: bool, told: str, seconds: float = 0.0) -> None:
        print(f"{mutant.id:18} {seconds:4.0f} s  {told}  ({mutant.what})", flush=True)
        if not noticed:
            missed.append(mutant.id)

    while waiting or any(copy.mutant for copy in copies):
        for copy in copies:
            if copy.mutant and (result := ended(copy, limit)):
                (copy.tree / copy.mutant.file).write_text(copy.text)
                tell(copy.mutant, *verdict(*result), time.monotonic() - copy.began)
                copy.mutant = None
            while waiting and not copy.mutant:
                mutant = waiting.pop(0)
                if wrong := apply(copy, mutant):
                    tell(mutant, False, wrong)
                else:
                    start(copy, mutant.tests, "-n", "0", "-x")
        time.sleep(0.05)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ids", nargs="*", default=[], help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="mistakes at a time")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a mistake first")
    parser.add_argument("--sample", type=int, default=0, help="instead of the list's: so many drawn ones for each file")
    parser.add_argument("--seed", type=int, default=1, help="which ones are drawn")
    given = parser.parse_args()
    mutants = read_sample(LIST, given.sample, given.seed) if given.sample else read_list(LIST)
    if unknown := sorted(set(given.ids) - {one.id for one in mutants}):
        parser.error(f"there is no {', '.join(unknown)}")
    chosen = [one for one in mutants if not given.ids or one.id in given.ids]
    tests = list(dict.fromkeys(test for one in chosen for test in one.tests))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        copies = [Copy(copy_tree(Path(folder) / str(number))) for number in range(given.jobs)]
        if not given.no_baseline and (failing := baseline(copies[0], tests, given.jobs)):
            print(f"these fail without any mistake: {', '.join(failing)}")
            return 1
        import_libraries()
        try:
            missed = try_all(chosen, copies, SAMPLE_LIMIT if given.sample else LIMIT)
        finally:  # stopped by Ctrl-C: the tests' processes have sessions of their own
            for copy in copies:
                if copy.mutant:
                    os.killpg(copy.pid, signal.SIGKILL)
    noticed, seconds = len(chosen) - len(missed), time.monotonic() - began
    print(f"{noticed} of {len(chosen)} noticed in {seconds:.0f} s; not: {' '.join(sorted(missed)) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
