"""One run, whole: its phases in order, each skipped where it is done."""

from __future__ import annotations

from collections.abc import Callable

from runner.base.files import local_folder
from runner.cache.store import Cache
from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint, Weights
from runner.core.errors import BadFileError
from runner.core.events import EventLog
from runner.data import class_images
from runner.data.images import Pictures
from runner.model import device
from runner.model.base import Base
from runner.plan.phases import Encode, Export, Phase, Plan, Prior, TrainPhase
from runner.runs.checkpoint_files import checkpoint_name
from runner.runs.run import Run
from runner.spec.schema import Spec
from runner.training.context import RunContext
from runner.training.distributed import Ranks
from runner.training.model_pool import ModelPool
from runner.training.phases.encode import encode_phase
from runner.training.phases.export import ExportRequest, ExportResult, export_phase, push
from runner.training.phases.prior import prior_phase
from runner.training.phases.train import train_phase
from runner.training.recorder import RunRecorder


def execute_run(
    run: Run,
    spec: Spec,
    plan: Plan,
    pictures: Pictures,
    base: Base,
    cache: Cache,
    event_log: EventLog,
    stop_requested: Callable[[], bool],
    ranks: Ranks,
    *,
    attempt: int,
    split: int,
    model_pool: ModelPool,
    beside: Callable[[], list[RunContext]],
) -> None:
    """`shelf`: what the process has kept of earlier runs; `beside`: the desks of runs that come later. Raises whatever
    ends the run early; the caller writes that into its state."""
    with run.locked():
        run.begin_attempt(attempt)
        ranks.wait()
        context = RunContext(spec, plan, pictures, base, cache, event_log, ranks, stop_requested, split, model_pool)
        order = ExportRequest(run, spec, base, event_log, stop_requested, cache, model_pool)
        delivered: ExportResult | None = None
        run.assert_unchanged("model.dtype", str(base.dtype), "name it in the spec, or go on where it was begun")
        if local_folder(spec.model.base) is None:  # what a name on the hub stands for may change
            run.assert_unchanged(
                "the base model", context.base_print, "set model.revision to the commit it was begun with"
            )
        progress = newest_checkpoint(run, plan, event_log)
        recorder = RunRecorder(run, plan, spec, event_log, progress, base.device, model_pool.bytes)
        try:
            for phase in plan.phases:
                if reason := done_already(phase, plan, progress):
                    event_log.line(f"{phase.name}: skipped, {reason}")
                    continue
                context.check_stop()
                recorder.begin(phase, progress)
                match phase:
                    case Prior():
                        prior_phase(context)
                        assert_class_images_unchanged(run, context)
                    case Encode():
                        first = progress is None
                        encode_phase(
                            context, phase, progress.weights if progress else Weights(), beside() if first else ()
                        )
                        if phase.latents and context.class_pictures:
                            assert_class_images_unchanged(run, context)  # those that were just read are still the same
                    case TrainPhase():
                        ranks.wait()
                        progress = train_phase(
                            context, phase, progress, recorder.save, recorder.settle, recorder.step, recorder.show
                        )
                        recorder.end_training(progress)
                        device.release(base.device)
                    case Export():
                        model_pool.live.clear()  # where nothing came between them and the last step
                        device.release(base.device)
                        if spec.export.best:
                            recorder.settle()  # it may be the one that is being written
                        delivered = export_phase(
                            order, best_of(run, progress, event_log) if spec.export.best else progress
                        )
                        recorder.settle()
                        recorder.show_pictures(delivered.step, [picture for _, picture in delivered.pictures])
                recorder.leave()
                event_log.end_phase()
            assert delivered is not None  # every plan ends with an export
            recorder.finish(delivered)
            if spec.hub.push:
                push(order)
        finally:
            recorder.close()
            event_log.end_phase()


def assert_class_images_unchanged(run: Run, context: RunContext) -> None:
    """Raises RunMismatchError where the class images are not those that the run was begun with."""
    run.assert_unchanged("the class images", class_images.fingerprint(context.class_pictures), "put them back")


def assist_rank(
    run: Run, spec: Spec, plan: Plan, pictures: Pictures, base: Base, cache: Cache, ranks: Ranks, split: int
) -> None:
    """The same run as its second, third, ... process sees it: it trains along and writes nothing."""
    ranks.wait()
    context = RunContext(spec, plan, pictures, base, cache, EventLog(), ranks, lambda: False, split)
    progress = newest_checkpoint(run, plan, EventLog(), apart=False)
    for phase in plan.training:
        if not done_already(phase, plan, progress):
            ranks.wait()
            progress = train_phase(
                context, phase, progress, lambda _: None, lambda: None, lambda _: None, lambda _, __: None
            )
            device.release(base.device)


def done_already(phase: Phase, plan: Plan, progress: Checkpoint | None) -> str | None:
    """Why a phase need not run, or None. What `encode` makes is only wanted by training."""
    if progress is None or isinstance(phase, Export):
        return None
    if ended := progress.scalars["meters"].get("ended"):
        return f"training ended early: {ended}"
    if isinstance(phase, Prior | Encode):
        return "all training is done" if progress.step >= plan.steps else None
    return f"trained to step {progress.step}" if progress.step >= phase.stop else None


def newest_checkpoint(run: Run, plan: Plan, event_log: EventLog, *, apart: bool = True) -> Checkpoint | None:
    """The newest checkpoint that verifies and belongs to this plan. `apart`: one that does not verify goes into
    quarantine, and that is said."""
    stops = {phase.key: phase.stop for phase in plan.training}
    for step, path in run.checkpoint_files():
        try:
            found = storage.read(path)
        except BadFileError as error:
            if apart:
                where = run.quarantine(path, str(error))
                event_log.line(f"{error}; moved to {where}, trying the checkpoint before it")
            continue
        if found.step <= stops.get(found.phase_key, -1):
            event_log.line(f"resuming at step {found.step} of {plan.steps}")
            return found
        event_log.line(f"{path.name} (step {step}) belongs to another plan; left alone")
    return None


def best_of(run: Run, last: Checkpoint | None, event_log: EventLog) -> Checkpoint | None:
    """The checkpoint with the lowest eval loss so far, which is kept for this; the last one where it does not verify."""
    step = last.scalars["meters"].get("best_step") if last else None
    if last is None or step in (None, last.step):
        return last
    try:
        found = storage.read(run.checkpoints / checkpoint_name(step))
    except BadFileError as error:
        event_log.line(f"the best step's checkpoint cannot be exported ({error}); exporting step {last.step}")
        return last
    event_log.line(f"export: step {step}, whose eval loss is the lowest")
    return found
