"""`fluxrun new --card`: settings with which a run fits a card, by the memory estimate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runner.base.param_counts import read_base_configs
from runner.core import hardware
from runner.core.hardware import query_gpus
from runner.core.humanize import format_bytes
from runner.data.images import Pictures
from runner.jobs import card_fit, memory
from runner.jobs.prepare import draft_spec, plan_of
from runner.newspec.template import NewError
from runner.newspec.template_tables import Values
from runner.plan.phases import Plan
from runner.spec.schema import Spec

OPTION = "--card"


def card_bytes(asked: str) -> int:
    """The memory that the option names: "24" is 24 GiB (sold as 24 GB), "auto" that of the smallest GPU of this
    machine.

    Raises NewError.
    """
    if asked != "auto":
        try:
            gib = float(asked.removesuffix("GiB").removesuffix("GB"))
        except ValueError:
            gib = 0.0
        if not 0 < gib < 10_000:
            raise NewError(OPTION, f"expected a card's memory in GiB, or auto, got {asked!r}; e.g. --card 24")
        return int(gib * 2**30)
    gpus = query_gpus() or {}
    visible = (hardware.visible_gpu_id(str(number)) for number in range(hardware.visible_gpu_count()))
    usable = [gpus[name] for name in visible if name in gpus]
    if not usable:
        raise NewError(OPTION, "nvidia-smi shows no GPU; write how much memory it has in GiB, e.g. --card 24")
    return min(gpu.total for gpu in usable)


def fitting_values(text_with: Callable[[Values], str], file: Path, pictures: Pictures | None, card: int) -> Values:
    """The values, by dotted key, with which the spec fits a card of so many bytes.

    {} where it fits as it is, else the first change that suffices, in the order of `fluxrun plan`. text_with: the
    spec's text with given values. Raises NewError, SpecError, PlanError.
    """
    spec, plan = _planned(text_with({}), file, pictures)
    shapes = read_base_configs(spec.model.base)
    if shapes is None:
        raise NewError(
            OPTION,
            f"the memory that {spec.model.base} needs is not known before its configs are on this disk; leave --card out, and "
            "see `fluxrun plan` when they are",
        )
    least, with_changes = _needed_bytes(spec, plan), ""
    if least <= card:
        return {}
    for change in card_fit.memory_savings(spec, plan, shapes):
        values = dict(change.values)
        if values.get("validate.size") == values.get("data.resolution"):
            values.pop("validate.size", None)  # its default
        needed = _needed_bytes(*_planned(text_with(values), file, pictures))
        if needed <= card:
            return values
        if needed < least:
            least, with_changes = needed, f", with {', '.join(change.keys)}"
    raise NewError(
        OPTION,
        f"no setting fits {spec.model.base} into {format_bytes(card)}; the lowest estimate is {format_bytes(least)}{with_changes}",
    )


def _planned(text: str, file: Path, pictures: Pictures | None) -> tuple[Spec, Plan]:
    spec = draft_spec(text, file)
    if spec.train.steps is None:  # memory does not depend on the number of steps, and epochs would need the pictures
        spec = spec.model_copy(update={"train": spec.train.model_copy(update={"steps": 1000, "epochs": None})})
    return spec, plan_of(spec, pictures)


def _needed_bytes(spec: Spec, plan: Plan) -> int:
    peak = memory.peak(spec, plan, on_gpu=True)
    assert peak is not None  # the base's configs are there
    return peak[0]
