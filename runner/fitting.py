"""What `fluxrun plan` tells of memory: the estimate per phase, the cards that have it, and what to set for a smaller one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from runner import estimate
from runner.finding import size
from runner.prepare import Job
from runner.shapes import read_shapes
from runner.spec import Spec

UNKNOWN = "memory: not known before the base is on this disk (its configs tell it)"


class Estimates:
    """Of the runs of one command: each base's configs are read once, and runs that differ in nothing that memory depends on
    share an estimate."""

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self._shapes = cache(read_shapes)
        self._kept: dict[object, tuple[dict[str, estimate.Memory], estimate.Fit | None]] = {}

    def of(self, job: Job) -> tuple[dict[str, estimate.Memory], estimate.Fit | None] | None:
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
        key = (alike, phases, plan.steps, plan.texts, tuple((plan.sizes or {}).items()))
        if key not in self._kept:
            found = estimate.estimate(spec, plan, shapes, on_gpu=self.on_gpu)
            self._kept[key] = found, estimate.fit(spec, plan, shapes) if self.on_gpu else None
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
    told = ", ".join(f"{name} {size(one.total)}" for name, one in found.items())
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


def _cards(fit: estimate.Fit) -> str:
    """`fits a card of 40 GB (33.1 GiB for joint); with model.quantize = "int8" 24 GB (16.7 GiB)`"""
    if fit.cards:
        said = f"fits a card of {fit.cards[0]} GB ({size(fit.needs)} for {fit.phase}, margin included)"
    else:
        said = f"fits no card of up to {estimate.CARDS[-1]} GB ({size(fit.needs)} for {fit.phase}, margin included)"
    for change in fit.changes:
        cards = estimate.cards_for(change.needs)
        said += f"; with {', '.join(change.keys)}: {cards[0]} GB ({size(change.needs)})"
    return said
