"""Writes down how one run goes: checkpoints, state, log, events."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image

from runner.checkpoint.storage import Checkpoint
from runner.checkpoint.writer import Writer
from runner.core import files
from runner.core.command_line import fluxrun_command
from runner.core.events import EventLog
from runner.model import device
from runner.plan.phases import Phase, Plan, TrainPhase
from runner.runs.run import Run
from runner.runs.sample_files import sample_tag, samples_of
from runner.spec.schema import Spec, dump, flat
from runner.tracking.history import History
from runner.tracking.hparams import write_session
from runner.tracking.trackers import trackers
from runner.training.loop import Step, TrainState, is_validation_step
from runner.training.phases.export import ExportResult, sample_file
from runner.training.validation import Validator

HEARTBEAT = 1.0  # seconds between writes of the step into state.json


@dataclass(frozen=True)
class TimeSpent:
    """On one phase, over all attempts. peak: bytes, as `device.peak_memory` counts them."""

    seconds: float
    peak: int


class RunRecorder:
    """Writes down how one run goes: checkpoints, state, log, events."""

    def __init__(
        self, run: Run, plan: Plan, spec: Spec, event_log: EventLog, progress: Checkpoint | None, where: torch.device,
        kept: int,
    ) -> None:  # fmt: skip
        """`kept`: bytes that an earlier run left on the device on purpose."""
        self.run, self.plan, self.spec, self.event_log, self.where = run, plan, spec, event_log, where
        self.phase: Phase = plan.phases[0]
        self.began, self.beat = time.monotonic(), 0.0
        self.seconds: list[float] = []
        self.at_step = progress.step if progress else 0
        self.meters = TrainState(**progress.scalars["meters"]) if progress else TrainState()
        self.loss = self.meters.smoothed
        self.before = run.state()
        self.spent: dict[str, TimeSpent] = {
            name: TimeSpent(facts.get("seconds", 0.0), int(facts.get("peak_memory_bytes", 0)))
            for name, facts in self.before.get("phases", {}).items()
        }
        self.entered: float | None = None
        self.trackers = [
            History(run.history_file, self.at_step),
            *trackers(run.folder, run.name, spec.track.to, self.at_step, flat(dump(spec))),
        ]
        if "tensorboard" in spec.track.to:
            with files.ignore_disk_errors():
                write_session(run)
        pivots = {phase.stop for phase in plan.training}
        self.writer = Writer(run.checkpoints, spec.checkpoint.keep, pivots, run.check_lease, event_log.log)
        self.held = device.held_memory(where) - kept
        device.reset_peak(where)
        run.write_state(
            "running", attempts=run.attempt, started=self.before.get("started") or time.time(),
            attempt_started=time.time(), step=self.at_step, versions=library_versions(),
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What the index shows, as far as it is known now."""
        return {
            "phase": self.phase.name,
            "step": self.at_step,
            "train_loss": self.loss,
            "eval_loss": self.meters.eval_loss,
            "best_step": self.meters.best_step,
            "ended": self.meters.ended or None,
            "skipped_steps": self.meters.skipped or None,
            "wall_s": round(self.before.get("wall_s", 0.0) + time.monotonic() - self.began, 3),
            "s_per_step": statistics.median(self.seconds) if self.seconds else self.before.get("s_per_step"),
            "peak_memory_bytes": max(  # of the phases: what is measured behind the last one belongs to none
                0 if self.entered is None else device.peak_memory(self.where), self.before.get("peak_memory_bytes", 0),
                *(one.peak for one in self.spent.values()),
            ),
            "memory_before_models": self.held,
            "phases": {
                name: {"seconds": round(one.seconds, 3), "peak_memory_bytes": one.peak}
                for name, one in self.spent.items()
            },
        }  # fmt: skip

    def begin(self, phase: Phase, progress: Checkpoint | None) -> None:
        self.phase, self.entered = phase, time.monotonic()
        device.reset_peak(self.where)
        self.heartbeat(durable=True)
        if isinstance(phase, TrainPhase):
            done = progress.step if progress else phase.start
            self.event_log.line(f"{phase.name}: steps {done + 1} to {phase.stop}")
            self.event_log.begin_phase(phase.name, done, phase.stop, "steps")
        else:
            self.event_log.line(f"{phase.name}: started")

    def leave(self) -> None:
        """The phase has ended, or the run in the middle of it."""
        if self.entered is None:
            return
        before = self.spent.get(self.phase.name, TimeSpent(0.0, 0))
        seconds = before.seconds + time.monotonic() - self.entered
        self.spent[self.phase.name], self.entered = (
            TimeSpent(seconds, max(before.peak, device.peak_memory(self.where))),
            None,
        )

    def step(self, step: Step) -> None:
        self.writer.look()
        self.run.check_lease()
        self.at_step, self.loss = step.number, step.smoothed
        self.seconds.append(step.seconds)
        for tracker in self.trackers:
            tracker.scalars(
                {"train/loss": step.loss, "train/grad_norm": step.grad_norm, "train/step_seconds": step.seconds,
                 **{f"lr/{kind}": lr for kind, lr in step.lr.items()}, **step.rows},
                step.number,
            )  # fmt: skip
        if step.skipped:
            self.meters = replace(self.meters, skipped=self.meters.skipped + 1)
            self.event_log.line(
                f"step {step.number} skipped: loss {step.loss}, gradient norm {step.grad_norm}; nothing was updated"
            )
        stop = self.phase.stop if isinstance(self.phase, TrainPhase) else self.plan.steps
        self.event_log.step(step.number, step.smoothed, step.seconds, stop, self.plan.steps)
        if time.monotonic() - self.beat > HEARTBEAT:
            self.heartbeat()

    def heartbeat(self, *, durable: bool = False) -> None:
        """Into the state, as long as the run is this attempt's."""
        self.beat = time.monotonic()
        self.run.check_lease()
        self.run.write_state("running", durable=durable, **self.facts())

    def show(self, step: int, look: Validator) -> None:
        """The eval loss, and pictures where there are any."""
        self.run.check_lease()  # drawing takes its time
        self.meters = is_validation_step(self.meters, step, look.eval_loss)
        if look.eval_loss is not None:
            values = {"eval/loss": look.eval_loss}
            values |= {f"eval/sigma {sigma:.1f}": loss for sigma, loss in look.by_sigma.items()}
            for tracker in self.trackers:
                tracker.scalars(values, step)
            self.event_log.log(f"eval loss at step {step}: {look.eval_loss:.5f}")
        for index, picture in enumerate(look.pictures):
            files.write_png(sample_file(self.run, step, index), picture)
        self.show_pictures(step, look.pictures)

    def show_pictures(self, step: int, pictures: Sequence[Image.Image]) -> None:
        own = self.spec.validation
        for picture, shot in zip(pictures, samples_of(own.prompts, own.count, self.spec.seed), strict=False):
            for tracker in self.trackers:
                tracker.picture(sample_tag(*shot), picture, step)

    def sum_up(self) -> None:
        """What HParams shows of a run beside its eval loss."""
        found = self.facts()
        values = {
            "run/train_loss": found["train_loss"],
            "run/s_per_step": found["s_per_step"],
            "run/peak_memory_GiB": found["peak_memory_bytes"] / 2**30,
        }
        for tracker in self.trackers:
            tracker.scalars({name: value for name, value in values.items() if value is not None}, self.at_step)

    def close(self) -> None:
        """However the run ends: what is being written is finished, and the state says how far it came."""
        self.writer.close()
        self.leave()
        if self.run.lease().attempt == self.run.attempt and self.run.state().get("state") == "running":
            with files.ignore_disk_errors():
                self.run.write_state("running", durable=False, **self.facts())
        for tracker in self.trackers:
            tracker.close()

    def save(self, made: Checkpoint) -> None:
        """Begin to write it; whatever comes of that is raised by the next step, save or `settle`."""
        self.writer.save(made)
        self.heartbeat()  # what is saved is what a run that stops here says it has done
        self.sum_up()

    def settle(self) -> None:
        """Wait until all that was saved is on the disk."""
        self.writer.wait()

    def end_training(self, progress: Checkpoint) -> None:
        if ended := progress.scalars["meters"]["ended"]:
            self.meters = replace(self.meters, ended=ended)
            self.event_log.line(f"training ends early: {ended}")

    def finish(self, delivered: ExportResult) -> None:
        more = export_facts(self.run, delivered)
        if self.spec.hub.push:  # true until the push is through, also if this process ends before it
            more["warning"] = (
                f"not pushed yet; `{fluxrun_command('export', self.run.name, '--push', runs=self.run.runs)}` does it"
            )
        self.run.check_lease()
        self.sum_up()
        self.run.write_state("done", **self.facts(), finished=time.time(), **more)
        self.event_log.line(f"done: {self.run.export}")


def export_facts(run: Run, delivered: ExportResult) -> dict[str, Any]:
    """What the state holds of an export."""
    exports = sorted(path.relative_to(run.folder).as_posix() for path in run.export.iterdir() if path.is_file())
    worst = max(delivered.errors.values(), default=None)
    errors = {"export_errors": dict(delivered.errors), "export_error": worst}
    return {"exports": exports, "exported_step": delivered.step, **errors}


def library_versions() -> dict[str, str]:
    names = ("fluxrun", "torch", "diffusers", "transformers", "peft")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
