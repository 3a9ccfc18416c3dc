"""What `fluxrun plan` tells of memory: the estimate per phase, the cards that have it, and what to set for a smaller one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from runner import estimate
from runner.finding import size
from runner.prepare import Job
from runner.shapes import read_shapes
from runner.spec import Spec

UNKNOWN = "memory: not known before the base is on this disk (its configs tell it)"


def with_memory(document: dict[str, Any], job: Job, *, on_gpu: bool) -> dict[str, Any]:
    """The plan's document with `memory` in each phase and `fits`; null where the base is not known."""
    shapes = read_shapes(job.spec.model.base)
    found = estimate.estimate(job.spec, job.plan, shapes, on_gpu=on_gpu) if shapes else {}
    phases = [
        {**phase, "memory": found[phase["name"]].as_json() if phase["name"] in found else None}
        for phase in document["phases"]
    ]
    fits = estimate.fit(job.spec, job.plan, shapes).as_json() if shapes and on_gpu else None
    return {**document, "phases": phases, "fits": fits}


def lines(job: Job, *, on_gpu: bool) -> Iterator[str]:
    """The same in two lines."""
    shapes = read_shapes(job.spec.model.base)
    if shapes is None:
        yield UNKNOWN
        return
    found = estimate.estimate(job.spec, job.plan, shapes, on_gpu=on_gpu)
    told = ", ".join(f"{name} {size(one.total)}" for name, one in found.items())
    yield f"memory: about {told}{'' if on_gpu else ' on the CPU'}"
    if on_gpu:
        yield _cards(estimate.fit(job.spec, job.plan, shapes))


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
