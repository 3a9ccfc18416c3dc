"""One run, whole: its phases in order, each skipped where it is done."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from runner import checkpoint, device, flux
from runner.cache import Cache
from runner.checkpoint import Checkpoint, Weights
from runner.data import Pictures
from runner.deliver import deliver
from runner.desk import Desk
from runner.digest import key_of
from runner.encode import encode
from runner.errors import BadFile
from runner.learn import train_phase
from runner.plan import Encode, Export, Inversion, Joint, Lora, Phase, Plan
from runner.rundir import Run
from runner.say import Say
from runner.spec import Spec, dump
from runner.track import Tracker
from runner.train import Step

HEARTBEAT = 1.0  # seconds between writes of the step into state.json


def execute(
    run: Run,
    spec: Spec,
    plan: Plan,
    pictures: Pictures,
    base: flux.Base,
    cache: Cache,
    say: Say,
    stop_requested: Callable[[], bool],
) -> None:
    """Raises whatever ends the run early; the caller writes that into its state."""
    with run.locked():
        run.claim(spec, plan, version("fluxrun"))
        desk = Desk(spec, plan, pictures, base, cache, say, stop_requested)
        progress = newest_checkpoint(run, plan, say)
        clerk = Clerk(run, plan, spec, say, progress, base.device)
        try:
            for phase in plan.phases:
                if reason := done_already(phase, plan, progress):
                    say.line(f"{phase.name}: skipped, {reason}")
                    continue
                desk.check_stop()
                clerk.begin(phase, progress)
                match phase:
                    case Encode():
                        encode(desk, phase, progress.weights.rows if progress else {})
                    case Joint() | Inversion() | Lora():
                        progress = train_phase(desk, phase, progress, clerk.save, clerk.step)
                        device.release(base.device)
                    case Export():
                        for index, (_, picture) in enumerate(
                            deliver(desk, run, progress.weights if progress else Weights())
                        ):
                            clerk.tracker.picture(str(index), picture, plan.steps)
                say.end_phase()
            clerk.finish()
        finally:
            clerk.tracker.close()
            say.end_phase()


def done_already(phase: Phase, plan: Plan, progress: Checkpoint | None) -> str | None:
    """Why a phase need not run, or None. What `encode` makes is only wanted by training."""
    if progress is None or isinstance(phase, Export):
        return None
    if isinstance(phase, Encode):
        return "all training is done" if progress.step >= plan.steps else None
    return f"trained to step {progress.step}" if progress.step >= phase.stop else None


def newest_checkpoint(run: Run, plan: Plan, say: Say) -> Checkpoint | None:
    """The newest checkpoint that verifies and belongs to this plan; older ones where it does not, and says so."""
    keys = {phase.key for phase in plan.training}
    for _, path in run.checkpoint_files():
        try:
            found = checkpoint.read(path)
        except BadFile as error:
            say.line(f"{error}; trying the checkpoint before it")
            continue
        if found.phase_key in keys:
            say.line(f"resuming at step {found.step} of {plan.steps}")
            return found
        say.line(f"{path.name} belongs to another plan; left alone")
    return None


class Clerk:
    """Writes down how one run goes: checkpoints, state, log, events."""

    def __init__(
        self, run: Run, plan: Plan, spec: Spec, say: Say, progress: Checkpoint | None, where: torch.device
    ) -> None:
        self.run, self.plan, self.spec, self.say, self.where = run, plan, spec, say, where
        self.phase: Phase = plan.phases[0]
        self.began, self.beat = time.monotonic(), 0.0
        self.seconds: list[float] = []
        self.at_step = progress.step if progress else 0
        self.loss = progress.scalars["loss"] if progress else None
        self.before = run.state()
        device.reset_peak(where)
        self.tracker = Tracker(run.folder, "tensorboard" in spec.track.to, self.at_step)
        run.write_state(
            "running", attempts=self.before.get("attempts", 0) + 1, started=self.before.get("started") or time.time(),
            plan_key=plan.key, spec_digest=key_of(str(sorted(map(str, dump(spec).items())))), steps=plan.steps,
            base=spec.model.base, step=self.at_step, versions=versions(),
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What the index shows, as far as it is known now."""
        return {
            "phase": self.phase.name,
            "step": self.at_step,
            "train_loss": self.loss,
            "wall_s": round(self.before.get("wall_s", 0.0) + time.monotonic() - self.began, 3),
            "s_per_step": statistics.median(self.seconds) if self.seconds else self.before.get("s_per_step"),
            "peak_memory_bytes": max(device.peak_memory(self.where), self.before.get("peak_memory_bytes", 0)),
        }

    def begin(self, phase: Phase, progress: Checkpoint | None) -> None:
        self.phase = phase
        self.run.write_state("running", **self.facts())
        if isinstance(phase, Joint | Inversion | Lora):
            done = progress.step if progress else phase.start
            self.say.line(f"{phase.name}: steps {done + 1} to {phase.stop}")
            self.say.begin_phase(phase.name, done, phase.stop, "steps")
        else:
            self.say.line(f"{phase.name}: started")

    def step(self, step: Step) -> None:
        self.at_step, self.loss = step.number, step.smoothed
        self.seconds.append(step.seconds)
        self.tracker.step(step)
        stop = self.phase.stop if isinstance(self.phase, Joint | Inversion | Lora) else self.plan.steps
        self.say.step(step, stop, self.plan.steps)
        if time.monotonic() - self.beat > HEARTBEAT:
            self.beat = time.monotonic()
            self.run.write_state("running", durable=False, **self.facts())

    def save(self, made: Checkpoint) -> None:
        """Write, read back, then prune: never an instant without a verified checkpoint."""
        path = self.run.checkpoints / checkpoint.file_name(made.step)
        checkpoint.write(path, made)
        checkpoint.read(path)
        pivots = {phase.stop for phase in self.plan.training}
        steps = [(step, old) for step, old in self.run.checkpoint_files() if step not in pivots]
        for _, old in steps[self.spec.checkpoint.keep :]:
            old.unlink()
        self.say.log(f"checkpoint at step {made.step}")

    def finish(self) -> None:
        exports = sorted(
            path.relative_to(self.run.folder).as_posix() for path in self.run.export.iterdir() if path.is_file()
        )
        self.run.write_state("done", **self.facts(), finished=time.time(), exports=exports)
        self.say.line(f"done: {self.run.export}")


def versions() -> dict[str, str]:
    names = ("fluxrun", "torch", "diffusers", "transformers", "peft")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def open_cache(runs: Path) -> Cache:
    return Cache(runs / "cache")
