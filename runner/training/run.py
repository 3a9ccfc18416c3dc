"""One run: its phases in order. A phase that is done is skipped."""

from __future__ import annotations

from collections.abc import Callable

from runner.base.files import local_folder
from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint, Weights
from runner.core.errors import BadFileError
from runner.core.events import EventLog
from runner.data import class_images
from runner.model import device
from runner.plan.phases import Encode, Export, Phase, Plan, Prior, TrainPhase
from runner.runs.checkpoint_files import checkpoint_name
from runner.runs.run import Run
from runner.training.context import RunContext
from runner.training.phases.encode import encode_phase
from runner.training.phases.export import ExportRequest, ExportResult, export_phase, push
from runner.training.phases.prior import prior_phase
from runner.training.phases.train import train_phase
from runner.training.recorder import RunRecorder


def execute_run(run: Run, context: RunContext, *, attempt: int, upcoming: Callable[[], list[RunContext]]) -> None:
    """Execute the phases of the run's plan in order, and skip those that are done.

    upcoming: contexts of later runs in this queue, whose texts the encode phase encodes, too, while it has the
    encoders. Raises whatever ends the run early; the caller writes that into state.json.
    """
    spec, plan, event_log = context.spec, context.plan, context.event_log
    with run.locked():
        run.begin_attempt(attempt)
        context.ranks.wait()
        exported: ExportResult | None = None
        run.assert_unchanged("model.dtype", str(context.base.dtype), "name it in the spec, or go on where it was begun")
        if local_folder(spec.model.base) is None:  # a name on the hub may stand for other files by now
            run.assert_unchanged(
                "the base model", context.base_fingerprint, "set model.revision to the commit it was begun with"
            )
        progress = newest_checkpoint(run, plan, event_log)
        recorder = RunRecorder(
            run, plan, spec, event_log, progress, context.base.device, kept_bytes=context.model_pool.bytes
        )
        try:
            for phase in plan.phases:
                if reason := skip_reason(phase, plan, progress):
                    event_log.message(f"{phase.name}: skipped, {reason}")
                    continue
                context.check_stop()
                recorder.phase_started(phase, progress)
                match phase:
                    case Prior():
                        prior_phase(context)
                        assert_class_images_unchanged(run, context)
                    case Encode():
                        weights = progress.weights if progress else Weights()
                        encode_phase(context, phase, weights, upcoming() if progress is None else ())
                        if phase.latents and context.class_pictures:
                            assert_class_images_unchanged(run, context)  # since they were read
                    case TrainPhase():
                        context.ranks.wait()
                        progress = train_phase(context, phase, progress, recorder)
                        recorder.training_ended(progress)
                        device.release(context.base.device)
                    case Export():
                        exported = export(run, context, progress, recorder)
                recorder.end_phase()
                event_log.end_phase()
            assert exported is not None  # every plan ends with an export
            recorder.finish(exported)
            if spec.hub.push:
                push(export_request(run, context))
        finally:
            recorder.close()
            event_log.end_phase()


def export(run: Run, context: RunContext, progress: Checkpoint | None, recorder: RunRecorder) -> ExportResult:
    """Export the last step, or the best one if the spec says so."""
    context.model_pool.live_encoders.clear()
    device.release(context.base.device)
    if context.spec.export.best:
        recorder.flush()  # the best checkpoint may be the one that is being written
        progress = best_checkpoint(run, progress, context.event_log)
    exported = export_phase(export_request(run, context), progress)
    recorder.flush()
    recorder.track_pictures(exported.step, [picture for _, picture in exported.pictures])
    return exported


def export_request(run: Run, context: RunContext) -> ExportRequest:
    return ExportRequest(
        run, context.spec, context.base, context.event_log, context.stop_requested, context.cache, context.model_pool
    )


def assert_class_images_unchanged(run: Run, context: RunContext) -> None:
    """Raises RunMismatchError if the class images are not those that the run began with."""
    run.assert_unchanged("the class images", class_images.fingerprint(context.class_pictures), "put them back")


def assist_rank(run: Run, context: RunContext) -> None:
    """The same run in the processes of the other GPUs (ranks 1, 2, ...): they train along and write nothing."""
    plan, ranks = context.plan, context.ranks
    ranks.wait()
    progress = newest_checkpoint(run, plan, context.event_log, quarantine=False)
    for phase in plan.training:
        if not skip_reason(phase, plan, progress):
            ranks.wait()
            progress = train_phase(context, phase, progress, recorder=None)
            device.release(context.base.device)


def skip_reason(phase: Phase, plan: Plan, progress: Checkpoint | None) -> str | None:
    """Why a phase need not run, or None if it must. Only training needs the results of `prior` and `encode`."""
    if progress is None or isinstance(phase, Export):
        return None
    if ended := progress.scalars["meters"].get("ended"):
        return f"training ended early: {ended}"
    if isinstance(phase, Prior | Encode):
        return "all training is done" if progress.step >= plan.steps else None
    return f"trained to step {progress.step}" if progress.step >= phase.stop else None


def newest_checkpoint(run: Run, plan: Plan, event_log: EventLog, *, quarantine: bool = True) -> Checkpoint | None:
    """The newest checkpoint that verifies and belongs to this plan. quarantine: move those that do not verify aside,
    and log it."""
    stops = {phase.key: phase.stop for phase in plan.training}
    for step, path in run.checkpoint_files():
        try:
            checkpoint = storage.read(path)
        except BadFileError as error:
            if quarantine:
                quarantined = run.quarantine(path, str(error))
                event_log.message(f"{error}; moved to {quarantined}, trying the checkpoint before it")
            continue
        if checkpoint.step <= stops.get(checkpoint.phase_key, -1):
            event_log.message(f"resuming at step {checkpoint.step} of {plan.steps}")
            return checkpoint
        event_log.message(f"{path.name} (step {step}) belongs to another plan; left alone")
    return None


def best_checkpoint(run: Run, last: Checkpoint | None, event_log: EventLog) -> Checkpoint | None:
    """The checkpoint with the lowest eval loss, which the writer keeps. If it does not verify, the last one."""
    step = last.scalars["meters"].get("best_step") if last else None
    if last is None or step in (None, last.step):
        return last
    try:
        best = storage.read(run.checkpoints / checkpoint_name(step))
    except BadFileError as error:
        event_log.message(f"the best step's checkpoint cannot be exported ({error}); exporting step {last.step}")
        return last
    event_log.message(f"export: step {step}, whose eval loss is the lowest")
    return best
