"""One run's folder: its files, the lock and lease on it, and its state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.core import files, locks
from runner.core.errors import BadFileError, LockHeldError, RunMismatchError
from runner.core.files import read_json
from runner.core.process_identity import Process
from runner.core.safetensors import read_metadata
from runner.runs.checkpoint_files import checkpoint_steps
from runner.runs.lease import Lease, live_holder, read_lease, write_lease
from runner.runs.spec_file import read_spec_tables
from runner.runs.state import FORMAT, RunState, is_number, is_text, read_state, writable
from runner.spec.run_names import names_in


class Run:
    """A run by its name below a runs folder. Making one touches no file."""

    def __init__(self, runs: Path, name: str) -> None:
        self.name = name
        self.runs = runs
        self.folder = runs / name
        self.spec_file = self.folder / "spec.toml"
        self.plan_file = self.folder / "plan.json"
        self.inputs_file = self.folder / "inputs.json"
        self.state_file = self.folder / "state.json"
        self.lock_file = self.folder / ".lock"
        self.stop_file = self.folder / "stop"
        self.lease_file = self.folder / "lease.json"
        self.pins_file = self.folder / "pins.json"
        self.log_file = self.folder / "run.log"
        self.history_file = self.folder / "history.jsonl"
        self.checkpoints = self.folder / "checkpoints"
        self.quarantine_folder = self.folder / "quarantine"
        self.samples = self.folder / "samples"
        self.export = self.folder / "export"
        self.attempt = 0  # of this process, from `begin_attempt` on

    @classmethod
    def at(cls, folder: Path) -> Run:
        """The run in a folder. Its spec has the name, which may include the folder of a sweep. Raises RunMismatchError
        where the folder is named otherwise."""
        name = str(read_spec_tables(folder / "spec.toml").get("name", folder.name))
        depth = len(Path(name).parts)
        if folder.parts[-depth:] != Path(name).parts:
            raise RunMismatchError(
                f"{folder} holds the spec of a run named {name!r}; rename the folder, or the run in spec.toml"
            )
        return cls(folder.parents[depth - 1], name)

    # ---- lock and lease ----------------------------------------------------------------------------------------------

    def locked(self) -> AbstractContextManager[None]:
        """The lock on the folder: a queue holds it while it claims the run, a trainer for a whole attempt. Raises
        LockHeldError."""
        return locks.hold_lock(self.lock_file)

    def lease(self) -> Lease:
        return read_lease(self.lease_file)

    def holder(self) -> Process | None:
        """The live process that has the run, if any."""
        return live_holder(self.lease_file, self.state_file)

    def take_lease(self) -> int:
        """Give this process the lease for a new attempt, whose number is returned. Call it under the lock."""
        attempt = self.lease().attempt + 1
        write_lease(self.lease_file, Lease(attempt, Process.current()))
        return attempt

    def next_attempt(self) -> int:
        """`take_lease` of a queue that has the run already. Raises LockHeldError."""
        with self.locked():
            return self.take_lease()

    def begin_attempt(self, attempt: int) -> None:
        """Prepare the folder for an attempt, under the lock. Raises LockHeldError where a later one has begun."""
        self.attempt = attempt
        self.check_lease()
        for folder in (self.checkpoints, self.samples):
            files.make_folder(folder)
        for folder in (self.folder, self.checkpoints, self.samples):
            files.remove_partial_files(folder)

    def check_lease(self) -> None:
        """Call it before every write: raises LockHeldError where this process has lost the run to a later attempt."""
        if (current := self.lease().attempt) != self.attempt:
            raise LockHeldError(
                f"{self.folder}: attempt {current} has begun, this is attempt {self.attempt}; nothing was written"
            )

    def lost_lease(self) -> LockHeldError | None:
        """For a queue that has claimed the run: the error to report where another process has it now."""
        holder = self.lease().holder
        return self.locked_error() if holder and holder != Process.current() else None

    def release(self) -> None:
        """Give the lease back, if this process has it."""
        lease = self.lease()
        if lease.holder == Process.current():
            write_lease(self.lease_file, replace(lease, holder=None))

    def refuse_if_locked(self) -> None:
        """Raises LockHeldError where a queue has the run, whether or not it trains it already."""
        if self.holder():
            raise self.locked_error()

    def locked_error(self) -> LockHeldError:
        """Names the process that has the run."""
        holder = self.lease().holder
        who = f"process {holder.pid}{'' if holder.is_local else f' on {holder.host}'}" if holder else "another process"
        return LockHeldError(f"{who} is working on {self.folder}; wait for it, or stop it")

    def request_stop(self) -> None:
        """For a run that waits in a queue. A trainer is stopped by a signal."""
        self.stop_file.touch()

    def take_stop_request(self) -> bool:
        """Whether a stop was requested. The request is removed."""
        requested = self.stop_file.is_file()
        self.stop_file.unlink(missing_ok=True)
        return requested

    # ---- state -------------------------------------------------------------------------------------------------------

    def state(self) -> RunState:
        """state.json, or what other files tell where it is missing. A run whose process died is "stopped"."""
        state = read_state(self.state_file)
        if state is None:
            steps = read_json(self.plan_file).get("steps")
            return RunState(
                "stopped",
                step=self.newest_step(),
                steps=steps if is_number(steps) else None,
                error="its state.json is missing or damaged; the same command goes on",
            )
        if state.state in ("running", "waiting") and not (locks.is_locked(self.lock_file) or self.holder()):
            return replace(state, state="stopped", error="its process is gone")
        return state

    def write_state(self, state: str, *, durable: bool = True, **facts: Any) -> None:
        """Replace the state. It keeps what is true of the attempt; `facts` (fields of RunState) are added."""
        before = read_state(self.state_file)
        kept = before.attempt_facts() if before else {}
        now = {"format": FORMAT, **kept, "state": state, "name": self.name, "updated": time.time(), **facts}
        files.write_json(self.state_file, RunState(**now).as_json(), durable=durable)

    def write_outcome(self, state: str, reason: str, **facts: Any) -> None:
        """Replace the state by "stopped", "failed" or "waiting" for a reason, and keep its progress."""
        self.write_state(state, **self.progress(), error=reason, **facts)

    def update_state(self, **facts: Any) -> None:
        """Change single values of the state and leave the others, unknown ones too. None removes a value."""
        files.write_json(self.state_file, writable({**read_json(self.state_file), **facts}))

    def progress(self) -> dict[str, Any]:
        """What state.json says of how far the run came and what it made."""
        state = read_state(self.state_file)
        return state.progress() if state else {}

    def started_at(self) -> float | None:
        """When the run was first started, in seconds since 1970."""
        state = read_state(self.state_file)
        return state.started if state else None

    def micro_batch_parts(self, batch_size: int) -> int:
        """Into how many parts a micro-batch is cut, as an earlier attempt that ran out of memory found out."""
        state = read_state(self.state_file)
        parts = int(state.split or 1) if state else 1
        return parts if parts > 0 and batch_size % parts == 0 else 1

    # ---- files -------------------------------------------------------------------------------------------------------

    def checkpoint_files(self) -> list[tuple[int, Path]]:
        """(step, file), newest first."""
        return checkpoint_steps(self.checkpoints)

    def newest_step(self) -> int:
        """Of the newest checkpoint; 0 where there is none."""
        return max((step for step, _ in self.checkpoint_files()), default=0)

    def newest_checkpoint(self) -> tuple[int, str]:
        """Step and phase key of the newest checkpoint whose header can be read. The rest of it is not verified here."""
        for step, path in self.checkpoint_files():
            try:
                return step, read_metadata(path).get("phase_key", "")
            except BadFileError:
                continue
        return 0, ""

    def sample_files(self) -> dict[int, dict[int, Path]]:
        """The sample images: by step, then by their number among the run's prompts and seeds."""
        samples: dict[int, dict[int, Path]] = {}
        for path in sorted(self.samples.glob("step-*.png")):
            step, _, number = path.stem.removeprefix("step-").partition("-")
            if step.isdecimal() and number.isdecimal():
                samples.setdefault(int(step), {})[int(number)] = path
        return samples

    def planned_key(self) -> str | None:
        """The key of the plan that the queue wrote."""
        key = read_json(self.plan_file).get("key")
        return key if isinstance(key, str) else None

    def assert_unchanged(self, what: str, value: str, remedy: str) -> None:
        """Compare a value that no resume key covers with what the run was begun with, and keep it the first time.
        Raises RunMismatchError where it differs, LockHeldError where the lease is lost."""
        self.check_lease()
        pinned = {name: text for name, text in read_json(self.pins_file).items() if is_text(text)}
        if pinned.setdefault(what, value) != value:
            then, now = (text if len(text) < 40 else f"{text[:12]}..." for text in (pinned[what], value))
            raise RunMismatchError(
                f"{what}: {self.folder} was begun with {then}, now it is {now}; {remedy}, or give this spec another `name`"
            )
        files.write_json(self.pins_file, pinned)

    def missing_message(self) -> str:
        """What to report where the folder of a claimed run is gone; "" where it is there."""
        try:
            if self.lease_file.is_file():
                return ""
        except OSError as error:
            return f"{self.folder} cannot be read any more ({error.strerror}); once it can, the same command goes on"
        lost = next((path for path in (self.runs, self.folder) if not path.is_dir()), self.lease_file)
        step = self.newest_step()
        left = f"the checkpoint of step {step} is still there" if step else "nothing that the run made is left there"
        return (
            f"{lost} is gone: it was removed or renamed, or its disk was taken away; {left}; put it back and the same command "
            "goes on, or else begins anew"
        )

    def refuse_links(self) -> None:
        """Raises RunMismatchError for symbolic links, which could lead out of a run folder that came from elsewhere."""
        folders = (self.checkpoints, self.quarantine_folder, self.samples, self.export)
        for path in (*folders, self.log_file, self.lock_file):
            if path.is_symlink():
                raise RunMismatchError(
                    f"{path} is a symbolic link; fluxrun writes only inside a run's own folder: take it away"
                )

    # ---- moving files aside ------------------------------------------------------------------------------------------

    def archive(self) -> Path:
        """Rename the whole folder, for --fresh; nothing trained is deleted. Returns the new path. Raises
        LockHeldError."""
        with self.locked():
            self.refuse_if_locked()
            target = _free_name(self.folder.with_name(f"{self.folder.name}.old"))
            self.folder.rename(target)
        files.DISK.sync_folder(target.parent)
        return target

    def is_archived(self) -> bool:
        """Whether the folder has another name than the run in its spec, as after `archive`."""
        try:
            return bool(read_spec_tables(self.spec_file).get("name", self.name) != self.name)
        except (OSError, ValueError, RecursionError):
            return False

    def quarantine(self, damaged: Path, reason: str) -> Path:
        """Move a damaged file to quarantine/ with the reason beside it. It is never deleted. Returns the new path.
        Raises LockHeldError where the lease is lost."""
        self.check_lease()
        files.make_folder(self.quarantine_folder)
        target = _free_name(self.quarantine_folder / damaged.name)
        files.write_text(target.with_name(f"{target.name}.txt"), f"{reason}\n")
        damaged.rename(target)
        for folder in (damaged.parent, self.quarantine_folder):
            files.DISK.sync_folder(folder)
        return target


def _free_name(wanted: Path) -> Path:
    """wanted-1, wanted-2, ...: the first that does not exist."""
    number = 1
    while (target := wanted.with_name(f"{wanted.name}-{number}")).exists():
        number += 1
    return target


def find_runs(runs: Path) -> Iterator[Run]:
    """Every run below a runs folder, by name. Those of a sweep are one level deeper."""
    for name in names_in(runs):
        yield Run(runs, name)
