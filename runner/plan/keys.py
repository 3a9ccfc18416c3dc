"""Which keys of a spec belong to a phase's resume key, and which may change between attempts."""

from __future__ import annotations

from typing import Any

from runner.spec.schema import Spec

# Raise it when a default or the arithmetic changes, so that the same spec trains to other weights than before: runs of
# the older number are then refused, not mixed. A new key at its default leaves every key as it was.
RESULT_FORMAT = 1

# Values that leave the trained weights alone. Everything else is in every training phase's key. `data.source` and
# `model.base` are paths; what they point at is in the key by its fingerprint.
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

# What is recomputed is the same to the bit, but not by compiled code, which then rounds otherwise.
RECOMPUTING = ("model.gradient_checkpointing", "inversion.gradient_checkpointing")

# Values that only say when phases end. A phase's key holds its start, and the ends of those before it: so a run may be
# made longer, where its schedule does not ask how long it is.
SPAN_KEYS = ("train.steps", "train.epochs", "inversion.until", "lora.until", "text_lora.until")
OPEN_ENDED = ("constant", "constant_with_warmup")


def _result_values(spec: Spec) -> dict[str, Any]:
    """What the user set, less NOT_IN_KEY and SPAN_KEYS; defaults are RESULT_FORMAT's."""
    values: dict[str, Any] = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    if values.get("stop"):  # when training looks is when it may end
        values["stop"]["every"] = spec.validation.every
    for dotted in (*NOT_IN_KEY, *SPAN_KEYS, *(() if spec.model.compile else RECOMPUTING)):
        *tables, last = dotted.split(".")
        table = values
        for name in tables:
            table = table.get(name, {})
        table.pop(last, None)
    return {key: value for key, value in values.items() if value != {}}
