"""Why a run cannot resume with other phase ends than it was begun with, and which keys to set so that it can."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from runner.plan.description import describe
from runner.plan.phases import Plan
from runner.spec.schema import Spec


class PhaseEnds(NamedTuple):
    """The steps after which the text side (token rows or a text LoRA) and the LoRA are no longer trained; 0: never
    trained."""

    text: int
    lora: int


class Span(NamedTuple):
    """Steps in which the same is trained."""

    start: int
    stop: int
    text: bool
    lora: bool

    @property
    def trains(self) -> tuple[bool, bool]:
        return self.text, self.lora


def resume_advice(planned: Mapping[str, Any], spec: Spec, plan: Plan, step: int) -> Iterator[str]:
    """The reason, and the keys to set if there are any.

    planned: the run's plan.json. spec, plan: what is asked for now. step: of the run's newest checkpoint.
    """
    old, new = _phase_ends(planned.get("phases")), _phase_ends([describe(phase) for phase in plan.training])
    if old is None or new is None or _can_resume(old, new, step):
        yield f"it is at step {step} already, and its phases would now end elsewhere"
        return
    yield _reason(old, new, step)
    steps = spec.train.steps or plan.steps
    candidates = (
        (PhaseEnds(old.text, new.lora), steps),
        (PhaseEnds(new.text, old.lora), steps),
        (old, steps),
        (old, max(old)),
    )
    for ends, total in candidates:
        lines = _lines_for(spec, ends, total, steps)
        if lines and _can_resume(old, ends, step):
            yield f"set {' and '.join(lines)}, with which it goes on"
            return


def _reason(old: PhaseEnds, new: PhaseEnds, step: int) -> str:
    for before, now in zip(_spans(old), _spans(new), strict=False):
        if before.trains != now.trains:
            return (
                f"steps {before.start + 1} to {min(step, before.stop)} have trained {_trained_text(before)}, "
                f"and would now train {_trained_text(now)}"
            )
        if step <= before.stop:
            return f"it is at step {step} already, and this phase would now end at step {now.stop}"
        if before.stop != now.stop:
            return f"it is at step {step} already; a phase of it ended at step {before.stop}, and would now end at step {now.stop}"
    return f"it is at step {step} already, and would now end at step {max(new)}"


def _lines_for(spec: Spec, ends: PhaseEnds, total: int, steps: int) -> list[str]:
    """The lines of TOML with which a spec gives these ends; [] where none do. total: their number of steps; steps: the
    spec's."""
    if total != steps and spec.train.steps is None:
        return []
    lines = [] if total == steps else [f"train.steps = {total}"]
    text_key, text_until = _text_until(spec)
    for key, until, stop in ((text_key, text_until, ends.text), ("lora.until", spec.lora.until, ends.lora)):
        if stop == math.ceil(until * total):
            continue
        share = _share(stop, total)
        if share is None or (stop == 0 and key != "lora.until"):
            return []
        lines.append(f"{key} = {share:g}")
    return lines


def _text_until(spec: Spec) -> tuple[str, float]:
    """The key that ends the training of the text side, and its value."""
    if spec.tokens:
        return "inversion.until", spec.inversion.until or 0.0
    return "text_lora.until", spec.text_lora.until if spec.text_lora else 0.0


def _share(stop: int, steps: int) -> float | None:
    """The decimal with the fewest digits from which a plan computes this stop; an exact one where four digits
    suffice."""
    for digits in range(1, 5):
        share = round(stop / steps, digits)
        if share <= 1 and math.isclose(share * steps, stop) and math.ceil(share * steps) == stop:
            return share
    for digits in range(1, 10):
        for share in (round(stop / steps, digits), round(stop / steps - 0.5 / 10**digits, digits)):
            if 0 <= share <= 1 and math.ceil(share * steps) == stop:
                return share
    return None


def _phase_ends(phases: Any) -> PhaseEnds | None:
    """From the phases of a plan.json; None where they are something else or train nothing."""
    text = lora = 0
    if not isinstance(phases, list):
        return None
    for phase in phases:
        is_phase = isinstance(phase, dict) and isinstance(phase.get("stop"), int)
        if not is_phase or not isinstance(phase.get("trains"), list):
            return None
        parts = [part.get("what") for part in phase["trains"] if isinstance(part, dict)]
        lora = max(lora, phase["stop"]) if "lora" in parts else lora
        text = max(text, phase["stop"]) if {"token rows", "text lora"} & set(parts) else text
    return PhaseEnds(text, lora) if text or lora else None


def _spans(ends: PhaseEnds) -> list[Span]:
    stops = sorted({*ends} - {0})
    starts = [0, *stops]
    return [Span(start, stop, stop <= ends.text, stop <= ends.lora) for start, stop in zip(starts, stops, strict=False)]


def _can_resume(old: PhaseEnds, new: PhaseEnds, step: int) -> bool:
    """Whether a checkpoint of the old run at `step` can be one of the new run."""
    for before, now in zip(_spans(old), _spans(new), strict=False):
        same = (before.start, before.trains) == (now.start, now.trains)
        if step <= before.stop:
            return same and step <= now.stop
        if not same or before.stop != now.stop:
            return False
    return False


def _trained_text(span: Span) -> str:
    sides = (("the text side", span.text), ("the LoRA", span.lora))
    return " and ".join(name for name, is_trained in sides if is_trained)
