"""One run's folder: names every file of it, holds its lock, knows what is done and why. No torch."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from runner import files
from runner.errors import Refused
from runner.plan import NOT_IN_KEY, Plan, as_json
from runner.spec import Spec, dump

VERSION_TABLE = "fluxrun"


@dataclass(frozen=True)
class Verdict:
    """What a run folder says of a plan. state: new, done, resume, changed."""

    state: str
    reason: str


class Run:
    def __init__(self, runs: Path, name: str) -> None:
        self.name = name
        self.folder = runs / name
        self.spec_file = self.folder / "spec.toml"
        self.plan_file = self.folder / "plan.json"
        self.state_file = self.folder / "state.json"
        self.lock_file = self.folder / ".lock"
        self.pins_file = self.folder / "pins.json"
        self.log_file = self.folder / "run.log"
        self.checkpoints = self.folder / "checkpoints"
        self.samples = self.folder / "samples"
        self.export = self.folder / "export"

    def locked(self) -> AbstractContextManager[None]:
        files.make_folder(self.folder)
        return files.locked(self.lock_file)

    # ---- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """state.json, or {} where there is none. A run whose process died reads as stopped."""
        state = self._raw_state()
        if state.get("state") == "running" and not files.is_locked(self.lock_file):
            state["state"] = "stopped"
            state["error"] = "its process is gone"
        return state

    def write_state(self, state: str, *, durable: bool = True, **more: Any) -> None:
        """Replace the state; keys given as None are left out, so that it holds only what is true now."""
        kept = {"attempts", "started", "plan_key", "spec_digest", "steps", "base", "versions"}
        before = {key: value for key, value in self._raw_state().items() if key in kept}
        now = {**before, "state": state, "name": self.name, "updated": time.time(), **more}
        files.write_json(self.state_file, {k: v for k, v in now.items() if v is not None}, durable=durable)

    def amend(self, **more: Any) -> None:
        """Change single values of the state, whatever it is; None takes one out."""
        now = {**self._raw_state(), **more}
        files.write_json(self.state_file, {key: value for key, value in now.items() if value is not None})

    def began(self) -> float | None:
        """When it was first started, in seconds since 1970."""
        started: float | None = self._raw_state().get("started")
        return started

    def _raw_state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self.state_file.read_text())
        except (FileNotFoundError, ValueError):  # a heartbeat is not synced, so a power cut may leave it empty
            state = {}
        return state

    # ---- done, and why ---------------------------------------------------------------------------------------------

    def verdict(self, spec: Spec, plan: Plan) -> Verdict:
        """Done means: the same key, and the outputs exist."""
        state = self._raw_state()
        if not self.spec_file.is_file():
            return Verdict("new", "no run folder yet")
        if state.get("plan_key") == plan.key:
            if state.get("state") == "done" and self.export.is_dir():
                return Verdict("done", "same spec, data and base; its exports are there")
            step = max((step for step, _ in self.checkpoint_files()), default=0)
            return Verdict(
                "resume",
                f"interrupted; last checkpoint at step {step} of {plan.steps}" if step else "no checkpoint yet",
            )
        changed = self.differences(spec)
        if changed:
            return Verdict("changed", "; ".join(changed))
        before = json.loads(self.plan_file.read_text()).get("training_key") if self.plan_file.is_file() else None
        if before == training_key(plan):
            return Verdict("resume", "what is exported or shown changed; the training is kept")
        return Verdict("changed", "the images, the captions or the base model are not the ones it was trained on")

    def differences(self, spec: Spec) -> list[str]:
        """Keys that change the result and differ from the run's own spec, as `KEY: old -> new`."""
        old = flat(_spec_tables(self.spec_file))
        new = flat(dump(spec))
        keys = [
            key for key in {**old, **new} if not any(key == skip or key.startswith(f"{skip}.") for skip in NOT_IN_KEY)
        ]
        return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]

    def claim(self, spec: Spec, plan: Plan, version: str) -> None:
        """Write what this run is. The spec that stands there already must give the same training."""
        files.sweep_aside(self.folder)
        if self.spec_file.is_file() and (verdict := self.verdict(spec, plan)).state == "changed":
            raise Refused(f"{self.folder} holds another run ({verdict.reason}); {WAYS_OUT}")
        for folder in (self.checkpoints, self.samples):
            files.make_folder(folder)
            files.sweep_aside(folder)
        resolved = {**dump(spec), VERSION_TABLE: {"version": version}}
        files.write_text(self.spec_file, tomli_w.dumps(resolved))
        files.write_json(self.plan_file, {**as_json(plan), "training_key": training_key(plan)})

    def pin(self, what: str, digest: str) -> None:
        """Remember what the training saw that no key could know beforehand. Raises Refused where it is another now."""
        pinned = json.loads(self.pins_file.read_text()) if self.pins_file.is_file() else {}
        if pinned.setdefault(what, digest) != digest:
            raise Refused(
                f"the {what} are not those that {self.folder} was begun with; put them back, or give this spec another `name`"
            )
        files.write_json(self.pins_file, pinned)

    def put_aside(self) -> Path:
        """Move the whole folder out of the way, for --fresh; nothing trained is deleted."""
        number = 1
        while (target := self.folder.with_name(f"{self.folder.name}.old-{number}")).exists():
            number += 1
        self.folder.rename(target)
        files.sync_folder(target.parent)
        return target

    def checkpoint_files(self) -> list[tuple[int, Path]]:
        """(step, file), newest first. Other files in the folder are left alone."""
        found = []
        for path in self.checkpoints.glob("step-*.safetensors"):
            digits = path.stem.removeprefix("step-")
            if digits.isdigit():
                found.append((int(digits), path))
        return sorted(found, reverse=True)


WAYS_OUT = "give this spec another `name`, undo the change, or add --fresh to move the old folder aside"


def training_key(plan: Plan) -> str:
    return plan.training[-1].key


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables -> {"lora.rank": 16, ...}."""
    out: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _spec_tables(path: Path) -> dict[str, Any]:
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    tables.pop(VERSION_TABLE, None)
    return tables


def read_spec(path: Path) -> Spec:
    """The resolved spec of a run folder."""
    return Spec.model_validate(_spec_tables(path))


def find_runs(runs: Path) -> Iterator[Run]:
    """Every run below a runs folder, by name (sweeps lie one level deeper)."""
    for path in sorted(runs.glob("**/state.json")):
        yield Run(runs, path.parent.relative_to(runs).as_posix())
