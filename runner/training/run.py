"""One run, whole: its phases in order, each skipped where it is done."""

from __future__ import annotations

from collections.abc import Callable

from runner.base.files import local_folder
from runner.cache.store import Cache
from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint, Weights
from runner.core.errors import BadFile
from runner.core.events import Say
from runner.data import class_images
from runner.data.images import Pictures
from runner.model import device
from runner.model.base import Base
from runner.plan.phases import Encode, Export, Inversion, Joint, Lora, Phase, Plan, Prior
from runner.runs.checkpoint_files import file_name
from runner.runs.run import Run
from runner.spec.schema import Spec
from runner.training.context import Desk
from runner.training.distributed import Ranks
from runner.training.model_pool import Shelf
from runner.training.phases.encode import encode
from runner.training.phases.export import Delivered, Order, deliver, push
from runner.training.phases.prior import fill_classes
from runner.training.phases.train import train_phase
from runner.training.recorder import Clerk


def execute(
    run: Run,
    spec: Spec,
    plan: Plan,
    pictures: Pictures,
    base: Base,
    cache: Cache,
    say: Say,
    stop_requested: Callable[[], bool],
    ranks: Ranks,
    *,
    attempt: int,
    split: int,
    shelf: Shelf,
    beside: Callable[[], list[Desk]],
) -> None:
    """`shelf`: what the process has kept of earlier runs; `beside`: the desks of runs that come later. Raises whatever
    ends the run early; the caller writes that into its state."""
    with run.locked():
        run.take(attempt)
        ranks.wait()
        desk = Desk(spec, plan, pictures, base, cache, say, ranks, stop_requested, split, shelf)
        order = Order(run, spec, base, say, stop_requested, cache, shelf)
        delivered: Delivered | None = None
        run.pin("model.dtype", str(base.dtype), "name it in the spec, or go on where it was begun")
        if local_folder(spec.model.base) is None:  # what a name on the hub stands for may change
            run.pin("the base model", desk.base_print, "set model.revision to the commit it was begun with")
        progress = newest_checkpoint(run, plan, say)
        clerk = Clerk(run, plan, spec, say, progress, base.device, shelf.bytes)
        try:
            for phase in plan.phases:
                if reason := done_already(phase, plan, progress):
                    say.line(f"{phase.name}: skipped, {reason}")
                    continue
                desk.check_stop()
                clerk.begin(phase, progress)
                match phase:
                    case Prior():
                        fill_classes(desk)
                        pin_classes(run, desk)
                    case Encode():
                        first = progress is None
                        encode(desk, phase, progress.weights if progress else Weights(), beside() if first else ())
                        if phase.latents and desk.class_pictures:
                            pin_classes(run, desk)  # those that were just read are still the same
                    case Joint() | Inversion() | Lora():
                        ranks.wait()
                        progress = train_phase(desk, phase, progress, clerk.save, clerk.settle, clerk.step, clerk.show)
                        clerk.end_training(progress)
                        device.release(base.device)
                    case Export():
                        shelf.live.clear()  # where nothing came between them and the last step
                        device.release(base.device)
                        if spec.export.best:
                            clerk.settle()  # it may be the one that is being written
                        delivered = deliver(order, best_of(run, progress, say) if spec.export.best else progress)
                        clerk.settle()
                        clerk.show_pictures(delivered.step, [picture for _, picture in delivered.pictures])
                clerk.leave()
                say.end_phase()
            assert delivered is not None  # every plan ends with an export
            clerk.finish(delivered)
            if spec.hub.push:
                push(order)
        finally:
            clerk.close()
            say.end_phase()


def pin_classes(run: Run, desk: Desk) -> None:
    """Raises Refused where the class images are not those that the run was begun with."""
    run.pin("the class images", class_images.fingerprint(desk.class_pictures), "put them back")


def assist(
    run: Run, spec: Spec, plan: Plan, pictures: Pictures, base: Base, cache: Cache, ranks: Ranks, split: int
) -> None:
    """The same run as its second, third, ... process sees it: it trains along and writes nothing."""
    ranks.wait()
    desk = Desk(spec, plan, pictures, base, cache, Say(), ranks, lambda: False, split)
    progress = newest_checkpoint(run, plan, Say(), apart=False)
    for phase in plan.training:
        if not done_already(phase, plan, progress):
            ranks.wait()
            progress = train_phase(
                desk, phase, progress, lambda _: None, lambda: None, lambda _: None, lambda _, __: None
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


def newest_checkpoint(run: Run, plan: Plan, say: Say, *, apart: bool = True) -> Checkpoint | None:
    """The newest checkpoint that verifies and belongs to this plan. `apart`: one that does not verify goes into
    quarantine, and that is said."""
    stops = {phase.key: phase.stop for phase in plan.training}
    for step, path in run.checkpoint_files():
        try:
            found = storage.read(path)
        except BadFile as error:
            if apart:
                where = run.set_apart(path, str(error))
                say.line(f"{error}; moved to {where}, trying the checkpoint before it")
            continue
        if found.step <= stops.get(found.phase_key, -1):
            say.line(f"resuming at step {found.step} of {plan.steps}")
            return found
        say.line(f"{path.name} (step {step}) belongs to another plan; left alone")
    return None


def best_of(run: Run, last: Checkpoint | None, say: Say) -> Checkpoint | None:
    """The checkpoint with the lowest eval loss so far, which is kept for this; the last one where it does not verify."""
    step = last.scalars["meters"].get("best_step") if last else None
    if last is None or step in (None, last.step):
        return last
    try:
        found = storage.read(run.checkpoints / file_name(step))
    except BadFile as error:
        say.line(f"the best step's checkpoint cannot be exported ({error}); exporting step {last.step}")
        return last
    say.line(f"export: step {step}, whose eval loss is the lowest")
    return found
