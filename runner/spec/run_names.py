"""Which names runs may have.

A run's name is its folder below the runs folder: NAME, or NAME/VALUES for a run of a sweep. No run's folder may hold
another run's, or be one of the runs folder's own files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import exists, isfile  # they answer False where a path is too long; Path's raise
from pathlib import Path

from runner.core import files
from runner.spec.export_names import webui_file
from runner.spec.unknown_keys import show_value

# What the runs folder and every run's folder have under fixed names, in lower case: some disks ignore case.
IN_RUNS_FOLDER = {
    "cache": "the cache of latents and text embeddings is there",
    "index.html": "the results page is there",
    "index.jsonl": "the results index is there",
}
IN_RUN_FOLDER = {
    "spec.toml", "plan.json", "state.json", "lease.json", "pins.json", "inputs.json", "history.jsonl", "run.log", "stop", "checkpoints",
    "quarantine", "samples", "export",
}  # fmt: skip
EVENTS = "events.out."  # TensorBoard's files in a run's folder begin so

OTHER_NAME = "set another `name` in this spec (letters, digits and . _ = , + -)"

# https://learn.microsoft.com/windows/win32/fileio/naming-a-file: device names, with any ending too; no dot at the end
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}

PARTIAL_EXTRA = (
    len("..") + 7 + len(files.PARTIAL_SUFFIX)
)  # bytes that `.FILE.PID.partial` adds to FILE; PID has up to 7 digits
CHECKPOINT_NAME = 50  # bytes, at most
LONGEST_PATH = 4095  # bytes, on Linux
LONGEST_RUNS_FOLDER = LONGEST_PATH - 255  # leaves room for the cache's files below it


def names_in(runs: Path) -> list[str]:
    """Names of the runs in a runs folder, sorted. Those of a sweep's runs are NAME/VALUES, one folder deeper."""
    spec_files = {*runs.glob("*/spec.toml"), *runs.glob("*/*/spec.toml")}
    return [path.parent.relative_to(runs).as_posix() for path in sorted(spec_files)]


def reserved(name: str) -> str | None:
    """Why a run of this name would be among fluxrun's own files, or None."""
    first, *second = name.lower().split("/")
    if first in IN_RUNS_FOLDER:
        return IN_RUNS_FOLDER[first]
    taken = [part for part in second if part in IN_RUN_FOLDER or part.startswith(EVENTS)]
    return f"every run's folder has a {taken[0]!r}" if taken else None


def unportable(name: str) -> str | None:
    """Why Windows cannot have a folder of this name, as when the runs folder is copied there, or None."""
    for part in name.lower().split("/"):
        stem = part.partition(".")[0]
        if stem in DEVICES:
            return f"Windows reserves {stem!r} for a device"
        if part.endswith("."):
            return "Windows drops a . at the end"
    return None


def to_run_name(text: str) -> str:
    """The text as a name of one part, with `-` for what a name may not have."""
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text).lstrip("-.=,+")[:100].rstrip(".-")
    if not name:
        return "my-lora"
    return f"run-{name}" if reserved(name) or unportable(name) else name


@dataclass(frozen=True)
class ExistingRuns:
    """The runs in a runs folder.

    names: of all, by the same in lower case; nested: one of those inside another folder, by that folder's name in lower
    case; around: the folder of a run that the runs folder itself is in; file_name_limit: bytes that the disk allows.
    """

    names: Mapping[str, str]
    nested: Mapping[str, str]
    around: Path | None
    file_name_limit: int

    @classmethod
    def below(cls, runs: Path) -> ExistingRuns:
        """Reads the runs folder, which need not exist."""
        names = names_in(runs)
        nested = {name.partition("/")[0].lower(): name for name in reversed(names) if "/" in name}
        above = (runs.absolute(), *runs.absolute().parents)
        around = (path for path in above if all(isfile(path / name) for name in ("plan.json", "spec.toml")))
        return cls({name.lower(): name for name in names}, nested, next(around, None), _file_name_limit(above))


def _file_name_limit(folders: Sequence[Path]) -> int:
    """Of the disk that the first folder is on, or will be: 255 nearly everywhere, 143 on an encrypted one."""
    with suppress(OSError):
        return os.pathconf(next(folder for folder in folders if exists(folder)), "PC_NAME_MAX")
    return 255


def name_fault(name: str, runs: Path, existing: ExistingRuns, *, swept: bool = False) -> str | None:
    """Why a run of this name cannot have its folder in `runs`, or None. swept: a sweep made the name."""
    outer, _, inner = name.partition("/")
    shown = show_value(f"{outer}/..." if swept else name)
    same = existing.names.get(name.lower())
    way_out = _how_to_move(runs, name) if same == name else OTHER_NAME
    if reason := reserved(name) or (None if same == name else unportable(name)):
        return f"expected a usable name, got {shown} ({reason}); {way_out}"
    if inner and outer.lower() in existing.names:
        return f"expected a folder outside that of the run {existing.names[outer.lower()]!r}, got {shown}; {way_out}"
    if not inner and (other := existing.nested.get(outer.lower())):
        way_out = f"{OTHER_NAME}, or {_how_to_move(runs, other)}"
        return f"expected a folder that holds no other run, got {shown}, which holds {other!r}; {way_out}"
    if same is not None and same != name:
        return f"expected a name that differs from {same!r} in more than case, got {shown} (some disks ignore case); {way_out}"
    if existing.around:
        return f"the runs folder {runs} is inside the folder of a run, {existing.around}; choose another with --runs"
    return _path_fault(name, runs, existing.file_name_limit, shown)


def _how_to_move(runs: Path, name: str) -> str:
    """How to keep a run that an earlier fluxrun made under this name."""
    other = to_run_name(name.replace("/", "-"))
    return f"move that run (mv {runs / name} {runs / other}) and set name = {json.dumps(other)} in its spec"


def longest_file_name(name: str) -> int:
    """Bytes of the longest of a run's files, while it is written."""
    return len(webui_file(name)) + PARTIAL_EXTRA


def _path_fault(name: str, runs: Path, file_name_limit: int, shown: str) -> str | None:
    """shown: the name as the message shows it."""
    folder, longest = runs / name, longest_file_name(name)
    if longest > file_name_limit:
        return (
            f"expected file names of at most {file_name_limit} bytes, as the disk of {runs} allows, got {longest} bytes for "
            f"{shown}; set a shorter `name`, or another runs folder with --runs"
        )
    length = len(str(folder.absolute()).encode()) + len("/checkpoints/") + max(longest, CHECKPOINT_NAME)
    if length > LONGEST_PATH:
        return (
            f"expected file paths of at most {LONGEST_PATH} bytes, got {length} bytes for {shown}; set a shorter `name`, or a runs "
            "folder nearer to the root with --runs"
        )
    for path in (folder, folder.parent):
        if path != runs and exists(path) and not path.is_dir():
            return f"expected no file where the run's folder will be, got {path}; {OTHER_NAME}"
    return None


def name_clashes(named: Sequence[tuple[str, Path, bool]]) -> Iterator[tuple[int, str]]:
    """(position, message) for runs of one command whose folders would be the same, or one inside the other.

    named: the name, the spec file, and whether a sweep made the name.
    """
    first_uses: dict[str, tuple[str, Path]] = {}
    holders: dict[str, tuple[str, Path]] = {}  # the outer folder of a name of two parts -> that name
    for position, (name, file, swept) in enumerate(named):
        outer, _, inner = name.partition("/")
        if inner:
            holders.setdefault(outer.lower(), (name, file))
        if name.lower() in first_uses:
            yield position, _same_name(name, *first_uses[name.lower()], swept=swept)
        else:
            first_uses[name.lower()] = name, file
    for position, (name, _, _) in enumerate(named):
        if name.lower() in holders:
            inside, file = holders[name.lower()]
            yield (
                position,
                f"expected a folder that holds no other run, got {show_value(name)} here and {show_value(inside)} in {file}; "
                "change the `name` of one",
            )


def _same_name(name: str, first: str, file: Path, *, swept: bool) -> str:
    """first: the name that `name` clashes with, in `file`."""
    if swept:
        sweep = show_value(name.partition("/")[0])
        return f"expected a different name for each sweep, got {sweep} here and in {file}; change the `name` of one"
    if first == name:
        return f"expected a different name for each run, got {show_value(name)} here and in {file}; change one"
    return (
        f"expected names that differ in more than case, got {show_value(name)} here and {show_value(first)} in {file} (some disks "
        "ignore case); change the `name` of one"
    )
