"""The curves on the results page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runner.report.page_run import PageRun
from runner.tracking.history import Series

MAX_POINTS = 240  # of a curve


def curves(page_run: PageRun) -> dict[str, Any]:
    """Each curve as [[step, ...], [value, ...]]; `sigmas`: [[sigma, ...], [loss, ...]] of the last evaluation."""
    series = page_run.series
    sigmas = sorted(
        (float(name.removeprefix("eval/sigma ")), list(losses.values())[-1])
        for name, losses in series.items()
        if name.startswith("eval/sigma 0.") and name.removeprefix("eval/sigma 0.").isdecimal()
    )
    return {
        "name": page_run.run.name,
        "label": page_run.label,
        "shown": page_run.short_label,
        "state": page_run.record.state,
        "loss": page_run.record.eval_loss,
        "eval": thinned(series.get("eval/loss", {})),
        "train": thinned(series.get("train/loss", {})),
        "sigmas": [[sigma for sigma, _ in sigmas], [loss for _, loss in sigmas]],
        "rows": {
            kind: {
                name.removeprefix(f"rows/{kind} "): thinned(values)
                for name, values in series.items()
                if name.startswith(f"rows/{kind} ")
            }
            for kind in ("norm", "drift")
        },
    }


def thinned(series: Series) -> list[list[float]]:
    """At most MAX_POINTS points, each the mean of an equal span of steps, at the last of them: the loss of a single
    step is mostly noise."""
    steps, values = list(series), list(series.values())
    span = -(-len(steps) // MAX_POINTS) or 1
    starts = range(0, len(steps), span)
    return [
        [steps[min(start + span, len(steps)) - 1] for start in starts],
        [float(f"{_mean(values[start : start + span]):.5g}") for start in starts],
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
