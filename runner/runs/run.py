"""One run's folder: names every file of it, holds its lock and lease, knows what is done and why. No torch."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.core import files, locks, safetensors
from runner.core.errors import BadFileError, LockHeldError, RunMismatchError
from runner.core.files import read_json
from runner.core.hashing import content_key
from runner.core.process_identity import Process
from runner.core.user_text import read_user_text
from runner.plan.description import as_json
from runner.plan.keys import NOT_IN_KEY, OPEN_ENDED, RECOMPUTING, SPAN_KEYS
from runner.plan.phases import Plan
from runner.runs import resume_advice
from runner.runs.checkpoint_files import checkpoint_steps
from runner.runs.inputs import TrainingInputs, describe_changes
from runner.runs.state import PROGRESS_FIELDS, is_number, is_text, json_state, read_state
from runner.spec.origins import annotated
from runner.spec.rules import DERIVED, is_default
from runner.spec.run_names import names_in
from runner.spec.schema import VERSION_TABLE, Spec, dump, flat

FORMAT = 1  # of state.json, plan.json and lease.json; older ones are read as long as they can be
FOREIGN_PATIENCE = 600.0  # seconds without a heartbeat after which another host's process is taken for dead


@dataclass(frozen=True)
class RunStatus:
    """What a run folder says of a plan. state: new, done, resume, changed; running, waiting: a queue has it now."""

    state: str
    reason: str


@dataclass(frozen=True)
class Lease:
    """Who works on a run, or None; `attempt` counts up, so that an earlier attempt's process knows that it is over."""

    attempt: int
    holder: Process | None


def _unsaid(_: str) -> str:
    return "not told"


class Run:
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
        self.attempt = 0  # this process's own, once it has taken the run

    @classmethod
    def at(cls, folder: Path) -> Run:
        """The run whose folder this is: its name, which may hold a sweep's folder, stands in its spec."""
        name = str(_spec_tables(folder / "spec.toml").get("name", folder.name))
        depth = len(Path(name).parts)
        if folder.parts[-depth:] != Path(name).parts:
            raise RunMismatchError(
                f"{folder} holds the spec of a run named {name!r}; rename the folder, or the run in spec.toml"
            )
        return cls(folder.parents[depth - 1], name)

    # ---- whose it is -----------------------------------------------------------------------------------------------

    def locked(self) -> AbstractContextManager[None]:
        """Held by whoever writes: shortly by a queue that enlists the run, for a whole attempt by its trainer."""
        return locks.hold_lock(self.lock_file)

    def lease(self) -> Lease:
        found = read_json(self.lease_file)
        attempt = found.get("attempt")
        return Lease(attempt if isinstance(attempt, int) else 0, Process.from_json(found.get("holder")))

    def holder(self) -> Process | None:
        """The process that works on this run now. One on another host lives as long as the state changes."""
        holder = self.lease().holder
        if holder is None or (holder.is_local and not holder.is_alive):
            return None
        if not holder.is_local and time.time() - _changed(self.state_file, self.lease_file) > FOREIGN_PATIENCE:
            return None
        return holder

    def claim(
        self,
        spec: Spec,
        plan: Plan,
        version: str,
        origin: Callable[[str], str] = _unsaid,
        inputs: Callable[[], TrainingInputs] | None = None,
    ) -> int:
        """Make the run this process's to start, and write what it is. The number of the attempt to come.

        `origin`: where a dotted key's value came from; `inputs`: what it is trained on, file by file. The spec that stands
        there already must give the same training.
        Raises LockHeldError, Refused.
        """
        self._no_links()
        files.make_folder(self.folder)  # here alone: a folder that vanishes while its run trains is not made again
        try:
            with self.locked():
                if (holder := self.holder()) and holder != Process.current():
                    raise self._locked_error()
                self.take_stop_request()  # what an earlier queue was told is not meant for this one
                self._write_claim(spec, plan, version, origin, inputs)
                return self._lease(self.lease().attempt + 1)
        except LockHeldError:  # by the lock: name who started its holder
            raise self._locked_error() from None

    def active_status(self) -> RunStatus | None:
        """What another process is doing about it now: running, or waiting in a queue."""
        holder, state = self.holder(), self.state()
        if holder is None or holder == Process.current() or state["state"] not in ("running", "waiting"):
            return None
        where = "" if holder.is_local else f" on {holder.host}"
        if state["state"] == "waiting":
            return RunStatus("waiting", f"in the queue of process {holder.pid}{where}")
        pid = locks.lock_holder(self.lock_file) or holder.pid
        since = state.get("attempt_started")
        began = time.strftime(", since %Y-%m-%d %H:%M", time.localtime(since)) if since else ""
        step, steps = (f"{state[key]:.0f}" if key in state else "?" for key in ("step", "steps"))
        return RunStatus("running", f"process {pid}{where} trains it{began}; at step {step} of {steps}")

    def refuse_if_locked(self) -> None:
        """Raises LockHeldError where a queue has it, perhaps without having begun."""
        if self.holder():
            raise self._locked_error()

    def _locked_error(self) -> LockHeldError:
        holder = self.lease().holder
        who = f"process {holder.pid}{'' if holder.is_local else f' on {holder.host}'}" if holder else "another process"
        return LockHeldError(f"{who} is working on {self.folder}; wait for it, or stop it")

    def lost_lease(self) -> LockHeldError | None:
        """For a queue, which enlisted it: whether another process has the run by now, and which."""
        holder = self.lease().holder
        return self._locked_error() if holder and holder != Process.current() else None

    def next_attempt(self) -> int:
        """Another try by the same queue."""
        with self.locked():
            return self._lease(self.lease().attempt + 1)

    def release(self) -> None:
        """The queue is through with this run."""
        lease = self.lease()
        if lease.holder == Process.current():
            files.write_json(self.lease_file, {"format": FORMAT, "attempt": lease.attempt, "holder": None})

    def begin_attempt(self, attempt: int) -> None:
        """Begin an attempt, under the lock. Raises LockHeldError where a later one has begun."""
        self.attempt = attempt
        self.check_lease()
        for folder in (self.checkpoints, self.samples):
            files.make_folder(folder)
        for folder in (self.folder, self.checkpoints, self.samples):
            files.remove_partial_files(folder)

    def request_stop(self) -> None:
        """For a queue that has not begun it yet; of one that trains, the trainer is told by a signal."""
        self.stop_file.touch()

    def take_stop_request(self) -> bool:
        """Asked once for each time it was told."""
        told = self.stop_file.is_file()
        self.stop_file.unlink(missing_ok=True)
        return told

    def check_lease(self) -> None:
        """To be asked before anything is committed: a process that lost its run unknowingly must not write."""
        if (now := self.lease().attempt) != self.attempt:
            raise LockHeldError(
                f"{self.folder}: attempt {now} has begun, this is attempt {self.attempt}; nothing was written"
            )

    def missing_message(self) -> str:
        """What to say of a run that was enlisted and whose folder is not there any more; "" where it is."""
        try:
            if self.lease_file.is_file():
                return ""
        except OSError as error:
            return f"{self.folder} cannot be read any more ({error.strerror}); once it can, the same command goes on"
        lost = next((path for path in (self.runs, self.folder) if not path.is_dir()), self.lease_file)
        step = max((step for step, _ in self.checkpoint_files()), default=0)
        left = f"the checkpoint of step {step} is still there" if step else "nothing that the run made is left there"
        return (
            f"{lost} is gone: it was removed or renamed, or its disk was taken away; {left}; put it back and the same command "
            "goes on, or else begins anew"
        )

    def _lease(self, attempt: int) -> int:
        lease = {"format": FORMAT, "attempt": attempt, "holder": Process.current().as_json()}
        files.write_json(self.lease_file, lease)
        return attempt

    def _no_links(self) -> None:
        """A run folder from elsewhere may hold links that lead out of it."""
        for path in (
            self.checkpoints,
            self.quarantine_folder,
            self.samples,
            self.export,
            self.log_file,
            self.lock_file,
        ):
            if path.is_symlink():
                raise RunMismatchError(
                    f"{path} is a symbolic link; fluxrun writes only inside a run's own folder: take it away"
                )

    # ---- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """state.json, or what the other files tell where there is none. A run whose process died reads as stopped."""
        state = read_state(self.state_file)
        if not state:
            state = {"state": "stopped", "step": max((step for step, _ in self.checkpoint_files()), default=0)}
            steps = read_json(self.plan_file).get("steps")
            return {
                **state,
                "steps": steps if is_number(steps) else None,
                "error": "its state.json is missing or damaged; the same command goes on",
            }
        if state.get("state") in ("running", "waiting") and not (locks.is_locked(self.lock_file) or self.holder()):
            state["state"] = "stopped"
            state["error"] = "its process is gone"
        return state

    def write_state(self, state: str, *, durable: bool = True, **more: Any) -> None:
        """Replace the state; keys given as None are left out, so that it holds only what is true now."""
        kept = {
            "attempts",
            "started",
            "attempt_started",
            "plan_key",
            "spec_digest",
            "steps",
            "base",
            "versions",
            "split",
        }
        before = {key: value for key, value in read_state(self.state_file).items() if key in kept}
        now = {"format": FORMAT, **before, "state": state, "name": self.name, "updated": time.time(), **more}
        files.write_json(self.state_file, json_state(now), durable=durable)

    def mark_ended(self, state: str, reason: str, **more: Any) -> None:
        """Keep what the state says of progress; replace what it says of the present."""
        facts = {key: value for key, value in read_state(self.state_file).items() if key in PROGRESS_FIELDS}
        self.write_state(state, **facts, error=reason, **more)

    def update_state(self, **more: Any) -> None:
        """Change single values of the state, whatever it is; None takes one out."""
        now = {**read_json(self.state_file), **more}
        files.write_json(self.state_file, json_state(now))

    def started_at(self) -> float | None:
        """When it was first started, in seconds since 1970."""
        started: float | None = read_json(self.state_file).get("started")
        return started

    # ---- done, and why ---------------------------------------------------------------------------------------------

    def status_for(self, spec: Spec, plan: Plan, inputs: Callable[[], TrainingInputs] | None = None) -> RunStatus:
        """Done means: the same key, and the outputs exist. `inputs`: what it would be trained on now."""
        state = read_state(self.state_file)
        if not self.spec_file.is_file():
            return RunStatus("new", "no run folder yet")
        if state.get("state") == "done" and state.get("plan_key") == plan.key and self._exports_exist(state):
            return RunStatus("done", "same spec, data and base; its exports are there")
        step, key = self._newest()
        known = read_json(self.plan_file)
        if known.get("training_key") == plan.training_key:
            if known.get("key") != plan.key:
                return RunStatus("resume", "what is exported or shown changed; the training is kept")
            at = f"interrupted; last checkpoint at step {step} of {plan.steps}"
            return RunStatus("resume", at if step else "no checkpoint yet")
        try:
            changed = self.changed_keys(spec)
        except (ValueError, RecursionError) as error:
            return RunStatus("changed", f"its spec.toml cannot be read ({error})")
        stops = {phase.key: phase.stop for phase in plan.training}
        fits = step <= stops.get(key, -1)
        if not changed and (fits or not (known or step)):  # a queue died while it wrote plan.json, or it was lost since
            return RunStatus("resume", f"its plan.json is lost; last checkpoint at step {step} of {plan.steps}")
        others = self._other_inputs(spec, inputs)
        told = "; ".join([*changed.values(), *others])
        if not changed:
            return RunStatus("changed", told or _unnamed_change(spec))
        if changed.keys() <= set(SPAN_KEYS) and not others:
            if fits:
                return RunStatus("resume", f"{told}; goes on from step {step} of {plan.steps}")
            if spec.schedule.name not in OPEN_ENDED:
                told += f"; the {spec.schedule.name} schedule depends on where it ends"
            else:
                told += "".join(f"; {line}" for line in resume_advice.resume_advice(known, spec, plan, step))
        return RunStatus("changed", told)

    def _other_inputs(self, spec: Spec, inputs: Callable[[], TrainingInputs] | None) -> list[str]:
        """Pictures, captions and files of the base that are not the ones it was trained on, as far as that was written."""
        old = TrainingInputs.read(read_json(self.inputs_file))
        if old is None or inputs is None:
            return []
        return describe_changes(old, inputs(), flat(_spec_tables(self.spec_file)), flat(dump(spec)))

    def _exports_exist(self, state: Mapping[str, Any]) -> bool:
        exports = state.get("exports")
        return isinstance(exports, list) and all((self.folder / str(name)).is_file() for name in exports)

    def _newest(self) -> tuple[int, str]:
        """Step and phase key of the newest checkpoint whose header can be read; it is verified when it is used."""
        for step, path in self.checkpoint_files():
            try:
                return step, safetensors.read_metadata(path).get("phase_key", "")
            except BadFileError:
                continue
        return 0, ""

    def changed_keys(self, spec: Spec) -> dict[str, str]:
        """Keys that change the result and differ from the run's own spec, with `KEY: old -> new`; not those that only
        follow another of them, as lora.alpha does lora.rank where it is not set."""
        before, now = _spec_tables(self.spec_file), dump(spec)
        old, new = flat(before), flat(now)
        skipped = NOT_IN_KEY if spec.model.compile else (*NOT_IN_KEY, *RECOMPUTING)
        keys = [key for key in {**old, **new} if not any(key == skip or key.startswith(f"{skip}.") for skip in skipped)]
        other = [key for key in keys if old.get(key) != new.get(key)]
        derived = [
            key
            for key, causes in DERIVED.items()
            if causes & set(other) and all(is_default(key, tables) for tables in (before, now))
        ]
        return {key: f"{key}: {_value(old.get(key))} -> {_value(new.get(key))}" for key in other if key not in derived}

    def _write_claim(
        self,
        spec: Spec,
        plan: Plan,
        version: str,
        origin: Callable[[str], str],
        inputs: Callable[[], TrainingInputs] | None,
    ) -> None:
        if (verdict := self.status_for(spec, plan, inputs)).state == "changed":
            raise RunMismatchError(f"{self.folder} holds another run ({verdict.reason}); {MISMATCH_REMEDIES}")
        resolved = {**dump(spec), VERSION_TABLE: {"version": version}}

        def told(key: str) -> str:
            return "what wrote this file" if key.startswith(f"{VERSION_TABLE}.") else origin(key)

        keys = {"key": plan.key, "training_key": plan.training_key}
        files.write_json(self.plan_file, {"format": FORMAT, **as_json(plan), **keys})
        if inputs is not None:
            files.write_json(self.inputs_file, {"format": FORMAT, **inputs().as_json()})
        files.write_text(self.spec_file, annotated(resolved, told))  # after the plan: with a spec there is a run
        digest = content_key(str(sorted(map(str, dump(spec).items()))))
        facts = {key: value for key, value in read_state(self.state_file).items() if key in PROGRESS_FIELDS}
        self.write_state(
            "waiting", **facts, plan_key=plan.key, spec_digest=digest, steps=plan.steps, base=spec.model.base
        )

    def micro_batch_parts(self, batch_size: int) -> int:
        """Into how many parts a micro-batch is cut, as an earlier attempt found out."""
        found = int(read_state(self.state_file).get("split", 1))
        return found if found > 0 and batch_size % found == 0 else 1

    def sample_files(self) -> dict[int, dict[int, Path]]:
        """The sample pictures: by step, then by their number among the run's prompts and seeds."""
        found: dict[int, dict[int, Path]] = {}
        for path in sorted(self.samples.glob("step-*.png")):
            step, _, number = path.stem.removeprefix("step-").partition("-")
            if step.isdecimal() and number.isdecimal():
                found.setdefault(int(step), {})[int(number)] = path
        return found

    def planned_key(self) -> str | None:
        found = read_json(self.plan_file).get("key")
        return found if isinstance(found, str) else None

    def assert_unchanged(self, what: str, value: str, way_out: str) -> None:
        """Remember what the training sees that no key could know beforehand. Raises RunMismatchError where it is another now."""
        self.check_lease()
        pinned = {name: found for name, found in read_json(self.pins_file).items() if is_text(found)}
        if pinned.setdefault(what, value) != value:
            then, now = (str(one) if len(str(one)) < 40 else f"{one[:12]}..." for one in (pinned[what], value))
            raise RunMismatchError(
                f"{what}: {self.folder} was begun with {then}, now it is {now}; {way_out}, or give this spec another `name`"
            )
        files.write_json(self.pins_file, pinned)

    def archive(self) -> Path:
        """Move the whole folder out of the way, for --fresh; nothing trained is deleted. Raises LockHeldError."""
        with self.locked():
            self.refuse_if_locked()
            target = _free_name(self.folder.with_name(f"{self.folder.name}.old"))
            self.folder.rename(target)
        files.DISK.sync_folder(target.parent)
        return target

    def is_archived(self) -> bool:
        """Whether the folder is named otherwise than the run whose spec it holds, as `put_aside` leaves it."""
        try:
            return bool(_spec_tables(self.spec_file).get("name", self.name) != self.name)
        except (OSError, ValueError, RecursionError):
            return False

    def checkpoint_files(self) -> list[tuple[int, Path]]:
        """(step, file), newest first."""
        return checkpoint_steps(self.checkpoints)

    def quarantine(self, bad: Path, reason: str) -> Path:
        """Move a file that does not verify to quarantine/, with the reason beside it; it is never deleted."""
        self.check_lease()
        files.make_folder(self.quarantine_folder)
        target = _free_name(self.quarantine_folder / bad.name)
        files.write_text(target.with_name(f"{target.name}.txt"), f"{reason}\n")
        bad.rename(target)
        for folder in (bad.parent, self.quarantine_folder):
            files.DISK.sync_folder(folder)
        return target


MISMATCH_REMEDIES = (
    "give this spec another `name`, undo the change, or queue it with --fresh, which moves the old folder aside"
)


def _unnamed_change(spec: Spec) -> str:
    """Where the folder does not say what it was trained on, file by file."""
    told = "the images, the captions or the base model are not the ones it was trained on"
    if spec.model.gradient_checkpointing:
        told += ", or an earlier fluxrun began it, for which model.gradient_checkpointing made another run"
    return told


def _value(value: Any) -> str:
    return "not set" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _free_name(wanted: Path) -> Path:
    """wanted-1, wanted-2, ...: the first that does not exist."""
    number = 1
    while (target := wanted.with_name(f"{wanted.name}-{number}")).exists():
        number += 1
    return target


def _changed(*paths: Path) -> float:
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


def _spec_tables(path: Path) -> dict[str, Any]:
    tables = tomllib.loads(read_user_text(path))
    tables.pop(VERSION_TABLE, None)
    return tables


def read_spec(path: Path) -> Spec:
    """The resolved spec of a run folder."""
    return Spec.model_validate(_spec_tables(path))


def find_runs(runs: Path) -> Iterator[Run]:
    """Every run below a runs folder, by name (sweeps lie one level deeper)."""
    for name in names_in(runs):
        yield Run(runs, name)
