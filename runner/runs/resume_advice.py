"""Why a run cannot go on to other phase ends than it was begun with, and which keys to set so that it can."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from runner.plan.description import describe
from runner.plan.phases import Plan
from runner.spec.schema import Spec

PhaseEnds = tuple[int, int]  # the steps at which the text side and the LoRA stop learning; 0: they never do
Span = tuple[int, int, bool, bool]  # start, stop, whether the text side learns, whether the LoRA does


def resume_advice(known: Mapping[str, Any], spec: Spec, plan: Plan, step: int) -> Iterator[str]:
    """known: the old run's plan.json; spec, plan: what is asked for now; step: of the old run's newest checkpoint."""
    old, new = _ends(known.get("phases")), _ends([describe(phase) for phase in plan.training])
    if old is None or new is None or _goes_on(old, new, step):
        yield f"it is at step {step} already, and its phases would now end elsewhere"
        return
    yield _why(old, new, step)
    steps = spec.train.steps or plan.steps
    for ends, total in (((old[0], new[1]), steps), ((new[0], old[1]), steps), (old, steps), (old, max(old))):
        found = _keys(spec, ends, total, steps)
        if found and _goes_on(old, ends, step):
            yield f"set {' and '.join(found)}, with which it goes on"
            return


def _why(old: PhaseEnds, new: PhaseEnds, step: int) -> str:
    for before, now in zip(_spans(old), _spans(new), strict=False):
        if before[2:] != now[2:]:
            return (
                f"steps {before[0] + 1} to {min(step, before[1])} have trained {_what(before)}, "
                f"and would now train {_what(now)}"
            )
        if step <= before[1]:
            return f"it is at step {step} already, and this phase would now end at step {now[1]}"
        if before[1] != now[1]:
            return f"it is at step {step} already; a phase of it ended at step {before[1]}, and would now end at step {now[1]}"
    return f"it is at step {step} already, and would now end at step {max(new)}"


def _keys(spec: Spec, ends: PhaseEnds, total: int, steps: int) -> list[str]:
    """The lines of a spec that give these ends; [] where none do."""
    told = [] if total == steps else [f"train.steps = {total}"]
    if total != steps and spec.train.steps is None:
        return []
    for key, stop in ((_text_key(spec), ends[0]), ("lora.until", ends[1])):
        own = spec.lora.until if key == "lora.until" else _text_until(spec)
        if stop == math.ceil(own * total):
            continue
        if (part := _share(stop, total)) is None or (stop == 0 and key != "lora.until"):
            return []
        told.append(f"{key} = {part:g}")
    return told


def _text_key(spec: Spec) -> str:
    return "inversion.until" if spec.tokens else "text_lora.until"


def _text_until(spec: Spec) -> float:
    return (spec.inversion.until or 0.0) if spec.tokens else spec.text_lora.until if spec.text_lora else 0.0


def _share(stop: int, steps: int) -> float | None:
    """The shortest decimal fraction whose product with `steps`, rounded up, is `stop`; an exact one is preferred if it has at
    most four digits."""
    for digits in range(1, 5):
        part = round(stop / steps, digits)
        if part <= 1 and math.isclose(part * steps, stop) and math.ceil(part * steps) == stop:
            return part
    for digits in range(1, 10):
        for part in (round(stop / steps, digits), round(stop / steps - 0.5 / 10**digits, digits)):
            if 0 <= part <= 1 and math.ceil(part * steps) == stop:
                return part
    return None


def _ends(phases: Any) -> PhaseEnds | None:
    text = lora = 0
    if not isinstance(phases, list):
        return None
    for phase in phases:
        if (
            not isinstance(phase, dict)
            or not isinstance(phase.get("stop"), int)
            or not isinstance(phase.get("trains"), list)
        ):
            return None
        learns = [part.get("what") for part in phase["trains"] if isinstance(part, dict)]
        lora = max(lora, phase["stop"]) if "lora" in learns else lora
        text = max(text, phase["stop"]) if {"token rows", "text lora"} & set(learns) else text
    return (text, lora) if text or lora else None


def _spans(ends: PhaseEnds) -> list[Span]:
    stops = sorted({*ends} - {0})
    starts = [0, *stops]
    return [(start, stop, stop <= ends[0], stop <= ends[1]) for start, stop in zip(starts, stops, strict=False)]


def _goes_on(old: PhaseEnds, new: PhaseEnds, step: int) -> bool:
    """Whether a checkpoint of the old run at `step` is one of the new run, too."""
    for before, now in zip(_spans(old), _spans(new), strict=False):
        same = (before[0], *before[2:]) == (now[0], *now[2:])
        if step <= before[1]:
            return same and step <= now[1]
        if not same or before[1] != now[1]:
            return False
    return False


def _what(span: Span) -> str:
    return " and ".join(what for what, learns in (("the text side", span[2]), ("the LoRA", span[3])) if learns)
