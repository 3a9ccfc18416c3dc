"""What a run may be called. A name is the run's folder below the runs folder, NAME, or NAME/VALUES for a run of a sweep; no
run's folder may hold another's, or be one of the runs folder's own files. No torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import exists, isfile  # which answer no where a path is too long, and Path's raise
from pathlib import Path

from runner.core import files
from runner.spec.export_names import webui_file
from runner.spec.unknown_keys import show_value

# What the runs folder and every run's folder hold under fixed names, in lower case: some disks ignore case.
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

ASIDE = (
    len("..") + 7 + len(files.PARTIAL_SUFFIX)
)  # bytes of `.FILE.PID.partial` beside the file's own name, a PID of up to 7 digits
LONGEST_PATH = 4095  # bytes, on Linux
LONGEST_RUNS_FOLDER = LONGEST_PATH - 255  # with room below it for the cache's files


def names_in(runs: Path) -> list[str]:
    """Names of the runs below a runs folder, sorted (runs of a sweep lie one level deeper)."""
    found = {*runs.glob("*/spec.toml"), *runs.glob("*/*/spec.toml")}
    return [path.parent.relative_to(runs).as_posix() for path in sorted(found)]


def reserved(name: str) -> str | None:
    """Why a run of this name would lie among fluxrun's own files, or None."""
    first, *second = name.lower().split("/")
    if first in IN_RUNS_FOLDER:
        return IN_RUNS_FOLDER[first]
    taken = [part for part in second if part in IN_RUN_FOLDER or part.startswith(EVENTS)]
    return f"every run's folder has a {taken[0]!r}" if taken else None


def unportable(name: str) -> str | None:
    """Why Windows could not hold this folder, e.g. when the runs folder is copied there, or None."""
    for part in name.lower().split("/"):
        stem = part.partition(".")[0]
        if stem in DEVICES:
            return f"Windows reserves {stem!r} for a device"
        if part.endswith("."):
            return "Windows drops a . at the end"
    return None


def allowed(text: str) -> str:
    """The text as one part of a name: what may not stand in one becomes `-`."""
    found = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text).lstrip("-.=,+")[:100].rstrip(".-")
    if not found:
        return "my-lora"
    return f"run-{found}" if reserved(found) or unportable(found) else found


@dataclass(frozen=True)
class RunsThere:
    """The runs below a runs folder. names: by themselves in lower case; inside: one of those that lie in a folder, by that
    folder's name in lower case; around: the folder of a run that the runs folder itself lies in; file_name_limit: bytes
    that its disk allows."""

    names: Mapping[str, str]
    inside: Mapping[str, str]
    around: Path | None
    file_name_limit: int

    @classmethod
    def below(cls, runs: Path) -> RunsThere:
        names = names_in(runs)
        inside = {name.partition("/")[0].lower(): name for name in reversed(names) if "/" in name}
        above = (runs.absolute(), *runs.absolute().parents)
        around = [path for path in above if all(isfile(path / name) for name in ("plan.json", "spec.toml"))]
        return cls(
            {name.lower(): name for name in names}, inside, around[0] if around else None, _file_name_limit(above)
        )


def name_fault(name: str, runs: Path, there: RunsThere, *, swept: bool = False) -> str | None:
    """Why a run of this name cannot have its folder below `runs`, or None. swept: a sweep gave the name."""
    outer, _, inner = name.partition("/")
    shown = show_value(f"{outer}/..." if swept else name)
    own = there.names.get(name.lower())
    way_out = _moving(runs, name) if own == name else OTHER_NAME
    if why := reserved(name) or (None if own == name else unportable(name)):
        return f"expected a usable name, got {shown} ({why}); {way_out}"
    if inner and outer.lower() in there.names:
        return f"expected a folder outside that of the run {there.names[outer.lower()]!r}, got {shown}; {way_out}"
    if not inner and (held := there.inside.get(outer.lower())):
        way_out = f"{OTHER_NAME}, or {_moving(runs, held)}"
        return f"expected a folder that holds no other run, got {shown}, which holds {held!r}; {way_out}"
    if own is not None and own != name:
        return f"expected a name that differs from {own!r} in more than case, got {shown} (some disks ignore case); {way_out}"
    if there.around:
        return f"the runs folder {runs} is inside the folder of a run, {there.around}; choose another with --runs"
    return _path_fault(name, runs, there, shown)


def _moving(runs: Path, name: str) -> str:
    """How a run that an earlier fluxrun made under this name is kept."""
    other = allowed(name.replace("/", "-"))
    return f"move that run (mv {runs / name} {runs / other}) and set name = {json.dumps(other)} in its spec"


def _file_name_limit(folders: Sequence[Path]) -> int:
    """Of the disk that the first folder lies on, or will lie on: 255 nearly everywhere, 143 on an encrypted one."""
    with suppress(OSError):
        return os.pathconf(next(folder for folder in folders if exists(folder)), "PC_NAME_MAX")
    return 255


def longest_file_name(name: str) -> int:
    """Bytes of the longest of a run's files, while it is written."""
    return len(webui_file(name)) + ASIDE


def _path_fault(name: str, runs: Path, there: RunsThere, shown: str) -> str | None:
    folder = runs / name
    if (wanted := longest_file_name(name)) > there.file_name_limit:
        return (
            f"expected file names of at most {there.file_name_limit} bytes, as the disk of {runs} allows, got {wanted} bytes for "
            f"{shown}; set a shorter `name`, or another runs folder with --runs"
        )
    length = len(str(folder.absolute()).encode()) + len("/checkpoints/") + max(wanted, 50)  # 50: a checkpoint's name
    if length > LONGEST_PATH:
        return (
            f"expected file paths of at most {LONGEST_PATH} bytes, got {length} bytes for {shown}; set a shorter `name`, or a runs "
            "folder nearer to the root with --runs"
        )
    for path in (folder, folder.parent):
        if path != runs and exists(path) and not path.is_dir():
            return f"expected no file where the run's folder will be, got {path}; {OTHER_NAME}"
    return None


def clashes(named: Sequence[tuple[str, Path, bool]]) -> Iterator[tuple[int, str]]:
    """(position, message) for runs of one command whose folders would meet. named: name, spec file, and whether a sweep
    gave the name."""
    seen: dict[str, tuple[str, Path]] = {}
    holders: dict[str, tuple[str, Path]] = {}  # folders of two-part names
    for position, (name, file, swept) in enumerate(named):
        outer, _, inner = name.partition("/")
        if inner:
            holders.setdefault(outer.lower(), (name, file))
        if name.lower() not in seen:
            seen[name.lower()] = name, file
            continue
        first, where = seen[name.lower()]
        if swept:
            yield (
                position,
                f"expected a different name for each sweep, got {show_value(outer)} here and in {where}; change the `name` of one",
            )
        elif first != name:
            yield (
                position,
                (
                    f"expected names that differ in more than case, got {show_value(name)} here and {show_value(first)} in {where} "
                    "(some disks ignore case); change the `name` of one"
                ),
            )
        else:
            yield (
                position,
                f"expected a different name for each run, got {show_value(name)} here and in {where}; change one",
            )
    for position, (name, _, _) in enumerate(named):
        if name.lower() in holders:
            inside, where = holders[name.lower()]
            yield (
                position,
                (
                    f"expected a folder that holds no other run, got {show_value(name)} here and {show_value(inside)} in {where}; change "
                    "the `name` of one"
                ),
            )
