"""The sample pictures on the results page: the same prompt and seed, run by run and step by step."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.report.page_run import PageRun, link
from runner.report.thumbnails import Thumbnails, spread_evenly
from runner.runs.sample_files import samples_of

MAX_THUMBNAILS = 1500  # on the page
MAX_STEPS = 8  # of a run, for one prompt and seed
MAX_BYTES = 8_000_000  # of all thumbnails; pictures beyond it are links only


def sample_grid(runs: Path, page_runs: Sequence[PageRun]) -> list[dict[str, Any]]:
    """For each prompt and seed, the cells of all runs that drew it: [index of the run, step, WebP in base64 or None,
    link]."""
    pictures: dict[tuple[str, int], dict[int, dict[int, Path]]] = {}  # by prompt and seed, then run, then step
    for index, page_run in enumerate(page_runs):
        for step, files in page_run.run.sample_files().items():
            for number, sample in enumerate(_samples(page_run.record.spec)):
                if number in files:
                    pictures.setdefault(sample, {}).setdefault(index, {})[step] = files[number]
    rows = sum(map(len, pictures.values()))
    steps_per_row = max(1, min(MAX_STEPS, MAX_THUMBNAILS // max(1, rows)))
    thumbnails, size, grid = Thumbnails(runs), 0, []
    for (prompt, seed), by_run in pictures.items():
        cells = []
        for index, by_step in by_run.items():
            for step in spread_evenly(by_step, steps_per_row):
                webp = thumbnails.read(by_step[step]) if size < MAX_BYTES else None
                size += len(webp or b"")
                cells.append([index, step, webp and base64.b64encode(webp).decode(), link(by_step[step], runs)])
        grid.append({"prompt": prompt, "seed": seed, "cells": cells})
    thumbnails.remove_unused()
    return grid


def _samples(spec: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(prompt, seed) of a run's sample pictures, by their number. The spec was read from a file that people may
    edit."""
    prompts, count, seed = spec.get("validate.prompts", []), spec.get("validate.count", 1), spec.get("seed", 0)
    if not isinstance(prompts, list) or type(count) is not int or type(seed) is not int:
        return []
    return samples_of([str(prompt) for prompt in prompts], min(count, 64), seed)
