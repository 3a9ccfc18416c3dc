"""In which spec keys runs differ, and which of them tell the runs apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from runner.runs.index import Record

# Eval losses are of the same images under the same base where these keys are equal.
EVAL_KEYS = ("model.base", "data.source", "data.holdout", "data.resolution", "data.prompt", "train.guidance")


def differing_keys(specs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all specs, in the spec's order. Empty specs are ignored."""
    known = [spec for spec in specs if spec]
    keys = dict.fromkeys(key for spec in known for key in spec)
    return [key for key in keys if any(spec.get(key) != known[0].get(key) for spec in known)]


def distinguishing_keys(records: Iterable[Record]) -> list[str]:
    """The differing keys that tell the runs apart: first those that were swept, then those that were set.

    A default that differs only because it follows one of these keys, as lora.alpha follows lora.rank, is left out.
    """
    known = [record for record in records if record.spec]
    differing = differing_keys(record.spec for record in known)
    swept = swept_keys(known)
    chosen = [key for key in differing if key in swept]
    chosen += [key for key in differing if key not in swept and any(key in record.origins for record in known)]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in known:
        groups.setdefault(repr([record.spec.get(key) for key in chosen]), []).append(record.spec)
    # What still differs where all chosen keys are equal follows none of them: fluxrun's own defaults have changed, say.
    independent = {key for specs in groups.values() for key in differing_keys(specs)}
    return chosen + [key for key in differing if key in independent and key not in chosen]


def swept_keys(records: Iterable[Record]) -> set[str]:
    return {key for record in records for key, origin in record.origins.items() if origin.startswith("sweep ")}


def have_comparable_losses(specs: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the eval losses of these runs are of the same images under the same base."""
    return not set(differing_keys(specs)) & set(EVAL_KEYS)
