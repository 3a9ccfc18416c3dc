"""A plan as JSON, for plan.json and `fluxrun plan --json`, and which modules a phase has on the device."""

from __future__ import annotations

from typing import Any

from runner.base.architectures import encoder_part
from runner.plan.phases import Encode, Export, Phase, Plan, Prior, TrainPhase

KINDS = {Prior: "prior", Encode: "encode", Export: "export"}


def as_json(plan: Plan) -> dict[str, Any]:
    sizes = plan.sizes or {}
    return {
        "name": plan.name,
        "steps": plan.steps,
        "disk_bytes": plan.disk_bytes,
        "notes": list(plan.notes),
        "sizes": [{"width": width, "height": height, "images": count} for (width, height), count in sizes.items()],
        "phases": [describe(phase) for phase in plan.phases],
    }


def describe(phase: Phase) -> dict[str, Any]:
    """One phase as JSON."""
    parts = phase.trains if isinstance(phase, TrainPhase) else ()
    return {
        "kind": phase.kind if isinstance(phase, TrainPhase) else KINDS[type(phase)],
        "name": phase.name,
        "start": phase.start if isinstance(phase, TrainPhase) else phase.at,
        "stop": phase.stop if isinstance(phase, TrainPhase) else phase.at,
        "trains": [
            {
                "what": part.what,
                **({"encoders": list(part.encoders)} if part.encoders else {}),
                "parameters": part.parameters,
            }
            for part in parts
        ],
        "resident": list(resident(phase)),
    }


def resident(phase: Phase) -> tuple[str, ...]:
    """The modules that a phase puts on the device: all at once to train, one after the other in the other phases."""
    match phase:
        case Encode():
            return (*map(encoder_part, phase.encoders), *(("vae",) if phase.latents else ()))
        case TrainPhase():
            return ("transformer", *(encoder_part(name) for part in phase.trains for name in part.encoders))
        case Export():
            return (*map(encoder_part, phase.encoders), "transformer", *(("vae",) if phase.pictures else ()))
        case Prior():
            return ("text_encoder", "text_encoder_2", "transformer", "vae")
