"""What `fluxrun plan` tells of memory: the estimate per phase, the cards that have it, and what to set for a smaller one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from runner.base.param_counts import BaseConfigs, read_base_configs
from runner.core.humanize import format_bytes
from runner.jobs import memory
from runner.jobs.job import Job
from runner.jobs.memory import TABLES, estimate, needs, with_values
from runner.plan.phases import Phase, Plan, TrainPhase, gradient_checkpointing
from runner.spec.schema import Spec

UNKNOWN = "memory: not known before the base is on this disk (its configs tell it)"


class Estimates:
    """Of the runs of one command: each base's configs are read once, and runs that differ in nothing that memory depends on
    share an estimate."""

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self._shapes = cache(read_base_configs)
        self._kept: dict[object, tuple[dict[str, memory.Memory], CardFit | None]] = {}

    def of(self, job: Job) -> tuple[dict[str, memory.Memory], CardFit | None] | None:
        """By phase, and the cards that have it, on a GPU; None where the base is not known."""
        spec, plan = job.spec, job.plan
        shapes = self._shapes(spec.model.base)
        if shapes is None:
            return None
        same = {"lr": None}
        alike = spec.model_copy(update={
            "name": "", "seed": 0, "train": spec.train.model_copy(update=same),
            "inversion": spec.inversion.model_copy(update=same),
            "text_lora": spec.text_lora and spec.text_lora.model_copy(update=same),
        })  # fmt: skip
        phases = tuple(replace(phase, key="") for phase in plan.phases)
        key = (alike, phases, plan.steps, plan.distinct_texts, tuple((plan.sizes or {}).items()))
        if key not in self._kept:
            found = memory.estimate(spec, plan, shapes, on_gpu=self.on_gpu)
            self._kept[key] = found, fit_card(spec, plan, shapes) if self.on_gpu else None
        return self._kept[key]


def with_memory(document: dict[str, Any], job: Job, estimates: Estimates) -> dict[str, Any]:
    """The plan's document with `memory` in each phase and `fits`; null where the base is not known."""
    found, fit = estimates.of(job) or ({}, None)
    phases = [
        {**phase, "memory": found[phase["name"]].as_json() if phase["name"] in found else None}
        for phase in document["phases"]
    ]
    return {**document, "phases": phases, "fits": fit and fit.as_json()}


def lines(job: Job, estimates: Estimates) -> Iterator[str]:
    """The same in two lines."""
    known = estimates.of(job)
    if known is None:
        yield UNKNOWN
        return
    found, fit = known
    told = ", ".join(f"{name} {format_bytes(one.total)}" for name, one in found.items())
    yield f"memory: about {told}{'' if fit else ' on the CPU'}"
    if fit:
        yield _cards(fit)


def less_memory(spec: Spec, *, on_gpu: bool) -> str:
    """What to set where the memory did not suffice: only what is not set already."""
    own, train = spec.model, spec.train
    keeps: list[str] = []
    anew: list[str] = []
    if own.offload == "none" and own.gradient_checkpointing is not True:
        (anew if own.compile else keeps).append("model.gradient_checkpointing = true")  # compiled code rounds otherwise
    if on_gpu and own.offload == "none" and not own.compile:
        keeps.append('model.offload = "blocks"')
    if own.quantize == "none":
        anew.append('model.quantize = "int8"')
    if train.batch_size > 1:
        anew.append(f"train.batch_size = 1 with train.accumulate = {train.accumulate * train.batch_size}")
    anew.append("a lower data.resolution")
    told = [f"set {' or '.join(keeps)} and queue it again, which goes on where it is"] if keeps else []
    told.append(f"{'or ' if keeps else ''}give it another `name` and {_or(anew)}, which begins anew")
    return ", ".join(told)


def _or(ways: Sequence[str]) -> str:
    return ", ".join(ways[:-1]) + (" or " if len(ways) > 1 else "") + ways[-1]


def _cards(fit: CardFit) -> str:
    """`fits a card of 40 GB (33.1 GiB for joint); with model.quantize = "int8" 24 GB (16.7 GiB)`"""
    if fit.cards:
        said = f"fits a card of {fit.cards[0]} GB ({format_bytes(fit.needs)} for {fit.phase}, margin included)"
    else:
        said = f"fits no card of up to {CARDS[-1]} GB ({format_bytes(fit.needs)} for {fit.phase}, margin included)"
    for change in fit.changes:
        cards = cards_for(change.needs)
        said += f"; with {', '.join(change.keys)}: {cards[0]} GB ({format_bytes(change.needs)})"
    return said


CARDS = (8, 12, 16, 24, 40, 80)  # GB, as sold


@dataclass(frozen=True)
class SettingChange:
    """Keys of a spec set otherwise, as text and as values by dotted key, and what its largest phase then needs of a card."""

    keys: tuple[str, ...]
    needs: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class CardFit:
    """What a run's largest phase needs of a card, margin included; cards: those that have it, in GB as sold; changes: what
    to set for a smaller one, each with all that costs less."""

    phase: str
    needs: int
    cards: tuple[int, ...]
    changes: tuple[SettingChange, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "needs_bytes": self.needs,
            "cards": list(self.cards),
            "changes": [
                {"set": list(one.keys), "needs_bytes": one.needs, "cards": list(cards_for(one.needs))}
                for one in self.changes
            ],
        }


def cards_for(bytes_: int) -> tuple[int, ...]:
    return tuple(card for card in CARDS if bytes_ <= card * 2**30)


def fit_card(spec: Spec, plan: Plan, shapes: BaseConfigs) -> CardFit:
    name, most = _largest(spec, plan, shapes)
    cards, changes = cards_for(most), []
    for change in ways(spec, plan, shapes):
        if cards == CARDS:
            break
        if cards_for(change.needs) != cards:
            cards = cards_for(change.needs)
            changes.append(change)
    return CardFit(name, most, cards_for(most), tuple(changes))


def ways(spec: Spec, plan: Plan, shapes: BaseConfigs) -> Iterator[SettingChange]:
    """To need less, the cheapest first, each with all those before it."""
    keys: dict[str, str] = {}
    values: dict[str, Any] = {}
    for text, update in _changes(spec):
        values |= {
            f"{TABLES.get(table, table)}.{key}": value for table, own in update.items() for key, value in own.items()
        }
        spec, plan = with_values(spec, update), _replanned(plan, update)
        keys[text.split(" =")[0]] = text  # int8 gives way to nf4
        if text.startswith("model.gradient"):
            keys.pop("inversion.gradient_checkpointing", None)  # which goes without saying then
        told = {key: value for key, value in values.items() if value is not None}
        yield SettingChange(tuple(keys.values()), _largest(spec, plan, shapes)[1], told)


def _largest(spec: Spec, plan: Plan, shapes: BaseConfigs) -> tuple[str, int]:
    name, memory = max(estimate(spec, plan, shapes, on_gpu=True).items(), key=lambda one: one[1].total)
    return name, needs(memory)


def _changes(spec: Spec) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """The cheapest first: what only costs time, then what changes what is learned, the least first."""
    images = spec.train.batch_size
    if images > 1:
        yield (
            f"train.batch_size = 1, train.accumulate = {spec.train.accumulate * images}",
            {"train": {"batch_size": 1, "accumulate": spec.train.accumulate * images}},
        )
    ways: list[tuple[bool | str, str]] = [("selective", '"selective"'), (True, "true")]
    whole = spec.model.compile or spec.model.offload != "none" or spec.lora.dropout > 0
    ways = ways[1:] if whole else ways
    if "t5" in spec.inversion.encoders and spec.tokens and not gradient_checkpointing(spec, token_rows=True):
        for value, shown in ways:
            yield f"inversion.gradient_checkpointing = {shown}", {"inversion": {"gradient_checkpointing": value}}
    if not spec.model.gradient_checkpointing:
        for value, shown in ways:
            keys: dict[str, dict[str, Any]] = {
                "model": {"gradient_checkpointing": value},
                "inversion": {"gradient_checkpointing": None},
            }
            yield f"model.gradient_checkpointing = {shown}", keys
    if spec.model.dtype == "fp32":
        yield 'model.dtype = "bf16"', {"model": {"dtype": "bf16"}}
    if spec.model.quantize == "none":
        yield 'model.quantize = "int8"', {"model": {"quantize": "int8"}}
    if spec.tokens and spec.inversion.encoders != ("clip",):
        yield 'inversion.encoders = ["clip"]', {"inversion": {"encoders": ("clip",)}}
    if spec.model.quantize != "nf4":
        yield 'model.quantize = "nf4"', {"model": {"quantize": "nf4"}}
    if spec.model.offload == "none" and not spec.model.compile:
        yield 'model.offload = "blocks"', {"model": {"offload": "blocks"}}
    if isinstance(spec.data.resolution, int) and spec.data.resolution > 512:
        yield "data.resolution = 512", {"data": {"resolution": 512}, "validation": {"size": 512}}


def _replanned(plan: Plan, update: Mapping[str, Mapping[str, Any]]) -> Plan:
    """What of a plan a change above makes another."""
    if "data" in update:
        plan = replace(plan, sizes=None)  # of the new resolution
    if "encoders" in update.get("inversion", {}):
        plan = replace(plan, phases=tuple(_clip_alone(phase) for phase in plan.phases))
    return plan


def _clip_alone(phase: Phase) -> Phase:
    if not isinstance(phase, TrainPhase):
        return phase
    trains = tuple(replace(part, encoders=("clip",)) if part.encoders else part for part in phase.trains)
    return replace(phase, trains=trains)
