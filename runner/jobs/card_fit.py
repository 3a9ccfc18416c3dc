"""Which cards have enough memory for a run, what to set for a smaller one, and how `fluxrun plan` says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from runner.base.param_counts import BaseConfigs, read_base_configs
from runner.core.humanize import format_bytes
from runner.jobs import memory
from runner.jobs.job import Job
from runner.jobs.memory import Memory, estimate, needs, with_values
from runner.plan.phases import Phase, Plan, TrainPhase, gradient_checkpointing
from runner.spec.schema import Spec

CARDS = (8, 12, 16, 24, 40, 80)  # GB, as sold
TABLES = {"validation": "validate"}  # fields of Spec whose table has another name
UNKNOWN = "memory: not known before the base is on this disk (its configs tell it)"

SpecUpdate = Mapping[str, Mapping[str, Any]]  # values by field of Spec and by key


@dataclass(frozen=True)
class SettingChange:
    """Keys of a spec with other values. keys: as lines of TOML; values: by dotted key. needs: bytes that a card must
    have for the run's largest phase with them."""

    keys: tuple[str, ...]
    needs: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class CardFit:
    """The phase of a run that needs most. needs: bytes that a card must have for it, with a margin. cards: those that
    have enough, in GB. changes: what to set for smaller cards, each with everything that costs less."""

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
                {"set": list(change.keys), "needs_bytes": change.needs, "cards": list(cards_for(change.needs))}
                for change in self.changes
            ],
        }


class Estimates:
    """Memory estimates of the jobs of one command. Each base's configs are read once, and jobs that differ in nothing
    that memory depends on share an estimate."""

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self._configs_of = cache(read_base_configs)
        self._estimates: dict[object, tuple[dict[str, Memory], CardFit | None]] = {}

    def of(self, job: Job) -> tuple[dict[str, Memory], CardFit | None] | None:
        """(memory by phase, the cards that have enough if on a GPU). None where the base's configs are not known."""
        spec, plan = job.spec, job.plan
        configs = self._configs_of(spec.model.base)
        if configs is None:
            return None
        no_rate = {"lr": None}
        comparable = spec.model_copy(update={
            "name": "", "seed": 0, "train": spec.train.model_copy(update=no_rate),
            "inversion": spec.inversion.model_copy(update=no_rate),
            "text_lora": spec.text_lora and spec.text_lora.model_copy(update=no_rate),
        })  # fmt: skip
        phases = tuple(replace(phase, key="") for phase in plan.phases)
        key = (comparable, phases, plan.steps, plan.distinct_texts, tuple((plan.sizes or {}).items()))
        if key not in self._estimates:
            memory_by_phase = memory.estimate(spec, plan, configs, on_gpu=self.on_gpu)
            self._estimates[key] = memory_by_phase, fit_card(spec, plan, configs) if self.on_gpu else None
        return self._estimates[key]


def cards_for(bytes_: int) -> tuple[int, ...]:
    """Those with enough memory, in GB."""
    return tuple(card for card in CARDS if bytes_ <= card * 2**30)


def fit_card(spec: Spec, plan: Plan, configs: BaseConfigs) -> CardFit:
    name, needed = _largest_phase(spec, plan, configs)
    cards, changes = cards_for(needed), []
    for change in memory_savings(spec, plan, configs):
        if cards == CARDS:
            break
        if cards_for(change.needs) != cards:
            cards = cards_for(change.needs)
            changes.append(change)
    return CardFit(name, needed, cards_for(needed), tuple(changes))


def memory_savings(spec: Spec, plan: Plan, configs: BaseConfigs) -> Iterator[SettingChange]:
    """Settings that need less memory, the cheapest first. Each includes all those before it."""
    lines: dict[str, str] = {}
    values: dict[str, Any] = {}
    for line, update in _single_changes(spec):
        values |= {
            f"{TABLES.get(table, table)}.{key}": value for table, keys in update.items() for key, value in keys.items()
        }
        spec, plan = with_values(spec, update), _replanned(plan, update)
        lines[line.split(" =")[0]] = line  # quantize = "nf4" replaces "int8"
        if line.startswith("model.gradient"):
            lines.pop("inversion.gradient_checkpointing", None)  # which model's covers
        shown_values = {key: value for key, value in values.items() if value is not None}
        yield SettingChange(tuple(lines.values()), _largest_phase(spec, plan, configs)[1], shown_values)


def _largest_phase(spec: Spec, plan: Plan, configs: BaseConfigs) -> tuple[str, int]:
    by_phase = estimate(spec, plan, configs, on_gpu=True)
    name = max(by_phase, key=lambda name: by_phase[name].total)
    return name, needs(by_phase[name])


def _single_changes(spec: Spec) -> Iterator[tuple[str, SpecUpdate]]:
    """(lines of TOML, the same as values). First what only costs time, then what changes the result, the least
    first."""
    images = spec.train.batch_size
    if images > 1:
        yield (
            f"train.batch_size = 1, train.accumulate = {spec.train.accumulate * images}",
            {"train": {"batch_size": 1, "accumulate": spec.train.accumulate * images}},
        )
    choices: list[tuple[bool | str, str]] = [("selective", '"selective"'), (True, "true")]
    if spec.model.compile or spec.model.offload != "none" or spec.lora.dropout > 0:  # these exclude "selective"
        choices = choices[1:]
    if "t5" in spec.inversion.encoders and spec.tokens and not gradient_checkpointing(spec, token_rows=True):
        for value, shown in choices:
            yield f"inversion.gradient_checkpointing = {shown}", {"inversion": {"gradient_checkpointing": value}}
    if not spec.model.gradient_checkpointing:
        for value, shown in choices:
            update: SpecUpdate = {
                "model": {"gradient_checkpointing": value},
                "inversion": {"gradient_checkpointing": None},
            }
            yield f"model.gradient_checkpointing = {shown}", update
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


def _replanned(plan: Plan, update: SpecUpdate) -> Plan:
    """The plan with those parts changed that memory depends on."""
    if "data" in update:
        plan = replace(plan, sizes=None)  # the new resolution is used instead
    if "encoders" in update.get("inversion", {}):
        plan = replace(plan, phases=tuple(_with_clip_alone(phase) for phase in plan.phases))
    return plan


def _with_clip_alone(phase: Phase) -> Phase:
    if not isinstance(phase, TrainPhase):
        return phase
    trains = tuple(replace(part, encoders=("clip",)) if part.encoders else part for part in phase.trains)
    return replace(phase, trains=trains)


# ---- as text and JSON ------------------------------------------------------------------------------------------------


def with_memory(document: dict[str, Any], job: Job, estimates: Estimates) -> dict[str, Any]:
    """A plan's JSON with `memory` in each phase, and `fits`; both are null where the base's configs are not known."""
    by_phase, fit = estimates.of(job) or ({}, None)
    phases = [
        {**phase, "memory": by_phase[phase["name"]].as_json() if phase["name"] in by_phase else None}
        for phase in document["phases"]
    ]
    return {**document, "phases": phases, "fits": fit and fit.as_json()}


def lines(job: Job, estimates: Estimates) -> Iterator[str]:
    """The memory of each phase in one line, and on a GPU the cards in another."""
    estimate = estimates.of(job)
    if estimate is None:
        yield UNKNOWN
        return
    by_phase, fit = estimate
    text = ", ".join(f"{name} {format_bytes(each.total)}" for name, each in by_phase.items())
    yield f"memory: about {text}{'' if fit else ' on the CPU'}"
    if fit:
        yield _cards_line(fit)


def _cards_line(fit: CardFit) -> str:
    """`fits a card of 40 GB (33.1 GiB for joint); with model.quantize = "int8": 24 GB (16.7 GiB)`"""
    if fit.cards:
        text = f"fits a card of {fit.cards[0]} GB ({format_bytes(fit.needs)} for {fit.phase}, margin included)"
    else:
        text = f"fits no card of up to {CARDS[-1]} GB ({format_bytes(fit.needs)} for {fit.phase}, margin included)"
    for change in fit.changes:
        smallest = cards_for(change.needs)[0]
        text += f"; with {', '.join(change.keys)}: {smallest} GB ({format_bytes(change.needs)})"
    return text


def less_memory(spec: Spec, *, on_gpu: bool) -> str:
    """What to set after a run that ran out of memory, without what is set already."""
    model, train = spec.model, spec.train
    same_run: list[str] = []  # settings with which the run can go on
    new_run: list[str] = []
    if model.offload == "none" and model.gradient_checkpointing is not True:
        # compiled code rounds differently with it, so the run cannot go on
        (new_run if model.compile else same_run).append("model.gradient_checkpointing = true")
    if on_gpu and model.offload == "none" and not model.compile:
        same_run.append('model.offload = "blocks"')
    if model.quantize == "none":
        new_run.append('model.quantize = "int8"')
    if train.batch_size > 1:
        new_run.append(f"train.batch_size = 1 with train.accumulate = {train.accumulate * train.batch_size}")
    new_run.append("a lower data.resolution")
    advice = [f"set {' or '.join(same_run)} and queue it again, which goes on where it is"] if same_run else []
    advice.append(f"{'or ' if same_run else ''}give it another `name` and {_join_or(new_run)}, which begins anew")
    return ", ".join(advice)


def _join_or(alternatives: Sequence[str]) -> str:
    return ", ".join(alternatives[:-1]) + (" or " if len(alternatives) > 1 else "") + alternatives[-1]
