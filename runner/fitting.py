"""What `fluxrun plan` tells of memory: the estimate per phase, the cards that have it, and what to set for a smaller one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner import estimate
from runner.finding import size
from runner.prepare import Job
from runner.shapes import read_shapes

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
