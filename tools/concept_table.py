"""What each way of training makes of the quickstart's creature: the concept's score, and what becomes of the base.

    python tools/concept_table.py [--runs build/concepts]

Trains the quickstart's spec eight ways (about 20 minutes on two cores; what is done is not trained again) and prints a
table. score: `tools/concept_score.py`, 32 pictures. kept: of 64 held-out captions about the world's own shapes, the
share that is still drawn right in all four things asked; circles: the same of 32 captions about the prior's class.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import check_tiny_base as check
import concept_score
import numpy as np
import tiny_world as world
import tomli_w

QUICKSTART = Path(__file__).resolve().parent.parent / "specs" / "quickstart.toml"
# name -> changes by dotted key; None takes a table out
WAYS: dict[str, dict[str, Any]] = {
    "LoRA only": {"tokens": None, "inversion": None},
    "CLIP inversion": {"inversion.encoders": ["clip"], "inversion.until": 1.0, "lora.until": 0},
    "CLIP + T5 inversion": {"inversion.until": 1.0, "lora.until": 0},
    "pivotal, CLIP": {"inversion.encoders": ["clip"]},
    "pivotal, CLIP + T5": {},
    "CLIP LoRA": {"tokens": None, "inversion": None, "text_lora": {"rank": 16}},
    "LoRA only, prior": {
        "tokens": None,
        "inversion": None,
        "prior": {"images": "classes", "prompt": "a circle", "count": 64},
    },
    "pivotal, CLIP + T5, prior": {"prior": {"images": "classes", "prompt": "a circle", "count": 64}},
}


def write_spec(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    tables = tomllib.loads(QUICKSTART.read_text())
    tables["data"]["source"] = str(QUICKSTART.with_suffix(""))
    for dotted, value in changes.items():
        *tables_in, last = dotted.split(".")
        inner = tables
        for table in tables_in:
            inner = inner.setdefault(table, {})
        if value is None:
            inner.pop(last)
        else:
            inner[last] = value
    path = folder / f"{name.replace(', ', '-').replace(' ', '')}.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def own_words(base: Any, exported: Any, scenes: Sequence[world.Scene]) -> float:
    """Share of the captions that are drawn right in all four things."""
    from runner.export import pipeline

    shots = [(scene.caption(index), index) for index, scene in enumerate(scenes)]
    images = pipeline.draw_samples(base, exported, shots, length=32, steps=20, size=64)
    return check.shares([np.asarray(image) for image in images], scenes)["all"]


def circles(count: int) -> list[world.Scene]:
    draw = random.Random("circles")
    found: list[world.Scene] = []
    while len(found) < count:
        scene = world.any_scene(draw)
        found += [scene] if scene.shape == "circle" else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("build/concepts"))
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    specs = {name: write_spec(given.runs, name, changes) for name, changes in WAYS.items()}
    command = [
        sys.executable,
        "-m",
        "runner",
        "queue",
        *map(str, specs.values()),
        "--runs",
        str(given.runs),
        "--gpus",
        "cpu",
    ]
    subprocess.run(command, check=True)

    import torch

    from runner.base.files import BUILTIN
    from runner.data import tokens
    from runner.export import formats
    from runner.model import libraries
    from runner.model.base import Base
    from runner.runs.run import Run
    from runner.runs.spec_file import read_spec

    libraries.quiet()
    base = Base(BUILTIN["builtin:tiny"], None, torch.device("cpu"), torch.float32)
    held, round_ones = check.held_out_scenes(64), circles(32)
    print("| trained | score | of the gap | kept | circles |\n|---|---|---|---|---|", flush=True)
    print(
        f"| (the base) | | | {own_words(base, None, held):.2f} | {own_words(base, None, round_ones):.2f} |", flush=True
    )
    for name, path in specs.items():
        run = Run(given.runs, path.stem)
        spec = read_spec(run.spec_file)
        known = tokens.placeholders(spec.tokens)
        exported = formats.exported_files(run.export, spec.name, known)
        found = concept_score.score_run(run.folder, 20)
        print(
            f"| {name} | {found['trained']:.2f} | {found['gap_closed']:.0%} | {own_words(base, exported, held):.2f} "
            f"| {own_words(base, exported, round_ones):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
