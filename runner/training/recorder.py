"""Records a run while it goes on: checkpoints, state.json, metrics, samples and the log."""

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
from runner.spec.schema import Spec, dump
from runner.spec.tables import flatten
from runner.tracking.history import History
from runner.tracking.hparams import write_session
from runner.tracking.trackers import trackers
from runner.training.loop import Step, TrainState
from runner.training.phases.export import ExportResult, sample_file
from runner.training.validation import ValidationResult

HEARTBEAT = 1.0  # seconds between two writes of the current step into state.json


@dataclass(frozen=True)
class TimeSpent:
    """The cost of one phase over all attempts: seconds, and peak device memory in bytes (`device.peak_memory`)."""

    seconds: float
    peak: int


class RunRecorder:
    """Records a run while it goes on: checkpoints, state.json, metrics, samples and the log.

    Every method that writes checks first that the run still belongs to this attempt, and raises LockHeldError if not.
    """

    def __init__(
        self, run: Run, plan: Plan, spec: Spec, event_log: EventLog, progress: Checkpoint | None,
        torch_device: torch.device, kept_bytes: int,
    ) -> None:  # fmt: skip
        """progress: the checkpoint that the run resumes from. kept_bytes: memory on the device taken by models that the
        model pool keeps from earlier runs."""
        self.run, self.plan, self.spec, self.event_log, self.device = run, plan, spec, event_log, torch_device
        self.phase: Phase = plan.phases[0]
        self.started, self.last_heartbeat = time.monotonic(), 0.0
        self.step_seconds: list[float] = []
        self.at_step = progress.step if progress else 0
        self.state = TrainState(**progress.scalars["meters"]) if progress else TrainState()
        self.previous = run.state()  # state.json as earlier attempts left it
        self.spent: dict[str, TimeSpent] = {
            name: TimeSpent(facts.get("seconds", 0.0), int(facts.get("peak_memory_bytes", 0)))
            for name, facts in (self.previous.phases or {}).items()
        }
        self.phase_started_at: float | None = None
        self.trackers = [
            History(run.history_file, self.at_step),
            *trackers(run.folder, run.name, spec.track.to, self.at_step, flatten(dump(spec))),
        ]
        if "tensorboard" in spec.track.to:
            with files.ignore_disk_errors():
                write_session(run)
        pivots = {phase.stop for phase in plan.training}
        self.writer = Writer(run.checkpoints, spec.checkpoint.keep, pivots, run.check_lease, event_log.log)
        self.memory_before = device.held_memory(torch_device) - kept_bytes
        device.reset_peak(torch_device)
        run.write_state(
            "running", attempts=run.attempt, started=self.previous.started or time.time(),
            attempt_started=time.time(), step=self.at_step, versions=library_versions(),
        )  # fmt: skip

    # ---- phases ----------------------------------------------------------------------------------------------------

    def phase_started(self, phase: Phase, progress: Checkpoint | None) -> None:
        """progress: the checkpoint that the phase starts from."""
        self.phase, self.phase_started_at = phase, time.monotonic()
        device.reset_peak(self.device)
        self.heartbeat(durable=True)
        if isinstance(phase, TrainPhase):
            done = progress.step if progress else phase.start
            self.event_log.message(f"{phase.name}: steps {done + 1} to {phase.stop}")
            self.event_log.begin_phase(phase.name, done, phase.stop, "steps")
        else:
            self.event_log.message(f"{phase.name}: started")

    def end_phase(self) -> None:
        """Count the time and memory of the phase, whether it is complete or was interrupted. Nothing if none is
        running."""
        if self.phase_started_at is None:
            return
        before = self.spent.get(self.phase.name, TimeSpent(0.0, 0))
        seconds = before.seconds + time.monotonic() - self.phase_started_at
        self.spent[self.phase.name] = TimeSpent(seconds, max(before.peak, device.peak_memory(self.device)))
        self.phase_started_at = None

    # ---- during training -------------------------------------------------------------------------------------------

    def on_step(self, step: Step, state: TrainState) -> None:
        """state: after the step. Raises what a checkpoint's write failed with, if one has."""
        self.writer.raise_if_failed()
        self.run.check_lease()
        self.at_step, self.state = step.number, state
        self.step_seconds.append(step.seconds)
        for tracker in self.trackers:
            tracker.scalars(
                {"train/loss": step.loss, "train/grad_norm": step.grad_norm, "train/step_seconds": step.seconds,
                 **{f"lr/{kind}": lr for kind, lr in step.lr.items()}, **step.rows},
                step.number,
            )  # fmt: skip
        if step.skipped:
            self.event_log.message(
                f"step {step.number} skipped: loss {step.loss}, gradient norm {step.grad_norm}; nothing was updated"
            )
        stop = self.phase.stop if isinstance(self.phase, TrainPhase) else self.plan.steps
        self.event_log.step(step.number, state.smoothed, step.seconds, stop, self.plan.steps)
        if time.monotonic() - self.last_heartbeat > HEARTBEAT:
            self.heartbeat()

    def on_validation(self, step: int, result: ValidationResult, state: TrainState) -> None:
        """Record the eval loss and the samples, if any. state: with the result."""
        self.run.check_lease()  # another attempt may have begun while the samples were drawn
        self.state = state
        if result.eval_loss is not None:
            values = {"eval/loss": result.eval_loss}
            values |= {f"eval/sigma {sigma:.1f}": loss for sigma, loss in result.by_sigma.items()}
            for tracker in self.trackers:
                tracker.scalars(values, step)
            self.event_log.log(f"eval loss at step {step}: {result.eval_loss:.5f}")
        for index, picture in enumerate(result.pictures):
            files.write_png(sample_file(self.run, step, index), picture)
        self.track_pictures(step, result.pictures)

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint. A failure is raised by the next `on_step`, `save` or `flush`."""
        self.writer.save(checkpoint)
        self.heartbeat()  # so that state.json names the saved step if the run stops here
        self.track_summary()

    def flush(self) -> None:
        """Wait until every saved checkpoint is on the disk. Raises what a write failed with."""
        self.writer.wait()

    def training_ended(self, progress: Checkpoint) -> None:
        """progress: the last checkpoint of a training phase."""
        if ended := progress.scalars["meters"]["ended"]:
            self.state = replace(self.state, ended=ended)
            self.event_log.message(f"training ends early: {ended}")

    # ---- state.json and trackers -----------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """The run's results so far, as state.json and the index hold them."""
        return {
            "phase": self.phase.name,
            "step": self.at_step,
            "train_loss": self.state.smoothed,
            "eval_loss": self.state.eval_loss,
            "best_step": self.state.best_step,
            "ended": self.state.ended or None,
            "skipped_steps": self.state.skipped or None,
            "wall_s": round((self.previous.wall_s or 0.0) + time.monotonic() - self.started, 3),
            "s_per_step": statistics.median(self.step_seconds) if self.step_seconds else self.previous.s_per_step,
            "peak_memory_bytes": max(  # within phases only: memory used after the last one belongs to none
                0 if self.phase_started_at is None else device.peak_memory(self.device),
                self.previous.peak_memory_bytes or 0, *(spent.peak for spent in self.spent.values()),
            ),
            "memory_before_models": self.memory_before,
            "phases": {
                name: {"seconds": round(spent.seconds, 3), "peak_memory_bytes": spent.peak}
                for name, spent in self.spent.items()
            },
        }  # fmt: skip

    def heartbeat(self, *, durable: bool = False) -> None:
        """Write the current facts into state.json."""
        self.last_heartbeat = time.monotonic()
        self.run.check_lease()
        self.run.write_state("running", durable=durable, **self.facts())

    def track_pictures(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """Give the pictures, in the order of the validation's samples, to the trackers."""
        validation = self.spec.validation
        samples = samples_of(validation.prompts, validation.count, self.spec.seed)
        for picture, sample in zip(pictures, samples, strict=False):
            for tracker in self.trackers:
                tracker.picture(sample_tag(*sample), picture, step)

    def track_summary(self) -> None:
        """Give the trackers what TensorBoard's HParams tab shows besides the eval loss."""
        facts = self.facts()
        values = {
            "run/train_loss": facts["train_loss"],
            "run/s_per_step": facts["s_per_step"],
            "run/peak_memory_GiB": facts["peak_memory_bytes"] / 2**30,
        }
        for tracker in self.trackers:
            tracker.scalars({name: value for name, value in values.items() if value is not None}, self.at_step)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def finish(self, exported: ExportResult) -> None:
        """The run is done."""
        facts = export_facts(self.run, exported)
        if self.spec.hub.push:  # stands until the push is complete, even if this process dies before
            facts["warning"] = (
                f"not pushed yet; `{fluxrun_command('export', self.run.name, '--push', runs=self.run.runs)}` does it"
            )
        self.run.check_lease()
        self.track_summary()
        self.run.write_state("done", **self.facts(), finished=time.time(), **facts)
        self.event_log.message(f"done: {self.run.export}")

    def close(self) -> None:
        """Finish the checkpoint being written, and write how far the run came, however it ends."""
        self.writer.close()
        self.end_phase()
        if self.run.lease().attempt == self.run.attempt and self.run.state().state == "running":
            with files.ignore_disk_errors():
                self.run.write_state("running", durable=False, **self.facts())
        for tracker in self.trackers:
            tracker.close()


def export_facts(run: Run, exported: ExportResult) -> dict[str, Any]:
    """What state.json holds of an export."""
    exports = sorted(path.relative_to(run.folder).as_posix() for path in run.export.iterdir() if path.is_file())
    worst = max(exported.errors.values(), default=None)
    errors = {"export_errors": dict(exported.errors), "export_error": worst}
    return {"exports": exports, "exported_step": exported.step, **errors}


def library_versions() -> dict[str, str]:
    names = ("fluxrun", "torch", "diffusers", "transformers", "peft")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
