"""Which keys of a spec are part of a phase's resume key, and which may change between the attempts of a run."""

from __future__ import annotations

from typing import Any

from runner.spec.schema import Spec

# Raise it when a default or the arithmetic changes, so that the same spec trains to other weights than before. Runs of
# a lower number are then refused instead of continued differently. A new spec key does not change the resume keys of
# specs that leave it at its default.
RESULT_FORMAT = 1

# Values that do not change the trained weights; all others are in every training phase's key. `data.source` and
# `model.base` are paths, and what they point at is in the key by its fingerprint.
NOT_IN_KEY = (
    "name",
    "checkpoint",
    "track",
    "export",
    "hub",
    "notify",
    "validate",
    "data.source",
    "data.workers",
    "model.base",
    "model.offload",
    "prior.images",
    "prior.batch_size",
)

# Recomputed activations are the same to the bit, except in compiled code, which then rounds differently.
RECOMPUTING = ("model.gradient_checkpointing", "inversion.gradient_checkpointing")

# Values that only set where phases end. A phase's key has its start and the ends of the phases before it, not its own
# end, so a run can be made longer, unless its schedule depends on the total number of steps.
SPAN_KEYS = ("train.steps", "train.epochs", "inversion.until", "lora.until", "text_lora.until")
OPEN_ENDED = ("constant", "constant_with_warmup")


def result_values(spec: Spec) -> dict[str, Any]:
    """The values of a spec that change the trained weights, without SPAN_KEYS and without defaults."""
    values: dict[str, Any] = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    if values.get("stop"):  # training may end early only where it is validated
        values["stop"]["every"] = spec.validation.every
    for dotted in (*NOT_IN_KEY, *SPAN_KEYS, *(() if spec.model.compile else RECOMPUTING)):
        *tables, last = dotted.split(".")
        table = values
        for name in tables:
            table = table.get(name, {})
        table.pop(last, None)
    return {key: value for key, value in values.items() if value != {}}
