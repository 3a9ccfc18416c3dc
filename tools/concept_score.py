"""How well pictures show the quickstart's creature, by a measure that is no loss: overlap of its two colours' regions.

    python tools/concept_score.py runs/quickstart          a finished run: before, after, floor and ceiling
    python tools/concept_score.py --pictures a.png b.png   pictures alone

A pixel counts as shell (teal) or belly (coral) where it is within REACH of that colour. A picture's score is the best,
over 1,352 drawings of the creature of every size and place, of the geometric mean of the two regions'
intersection-over-union: 1 is the creature as drawn, 0 lacks one of its colours. Blank pictures score 0; the VAE's
versions of real drawings give what nothing here can beat.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny_world as world
from PIL import Image

Array = np.ndarray[Any, Any]
COUNT = 32
REACH = 80.0  # of 441


def regions(picture: Array) -> Array:
    """picture [64, 64, 3] uint8 -> [2, 64 * 64], 1 where the pixel has the shell's or the belly's colour."""
    flat = picture.reshape(-1, 3).astype(np.float32)
    colours = np.array([world.SHELL, world.BELLY], np.float32)
    near: Array = np.linalg.norm(flat[None] - colours[:, None], axis=-1) < REACH
    return near.astype(np.float32)


@cache
def drawings() -> Array:
    """Regions of the drawn creature, [N, 2, 64 * 64]."""
    places = [(r, x, y) for r in range(10, 26, 2) for x in range(20, 46, 2) for y in range(20, 46, 2)]
    return np.stack([regions(np.asarray(world.concept((x, y), r, (0, 0, 0)))) for r, x, y in places])


def overlap(picture: Array) -> float:
    """0..1; picture [64, 64, 3] uint8."""
    found, made = regions(picture), drawings()
    both = np.einsum("nkp,kp->nk", made, found)
    either = made.sum(-1) + found.sum(-1) - both
    return float(np.sqrt((both / either).prod(1)).max())


def score(pictures: Sequence[Array]) -> float:
    """Mean overlap, 0..1; higher is better."""
    return float(np.mean([overlap(picture) for picture in pictures]))


def scenes() -> list[tuple[str, str, str]]:
    """(size, background, place) of the COUNT pictures; every background with every place but one."""
    backgrounds, places, sizes = list(world.BACKGROUNDS), list(world.PLACES), list(world.SIZES)
    return [(sizes[i % 3], backgrounds[i % 8], places[(i + i // 8) % 5]) for i in range(COUNT)]


def prompts(word: str) -> list[str]:
    return [
        f"a {f'{size} {word}'.strip()} on a {background} background {place}" for size, background, place in scenes()
    ]


def blank() -> list[Array]:
    return [np.full((64, 64, 3), world.BACKGROUNDS[background], np.uint8) for _, background, _ in scenes()]


def reconstructions(base: Path) -> list[Array]:
    from check_tiny_base import reconstructed

    real = [
        np.asarray(world.concept(world.PLACES[place], world.SIZES[size], world.BACKGROUNDS[background]))
        for size, background, place in scenes()
    ]
    return reconstructed(base, real)[0]


def score_run(folder: Path, steps: int) -> dict[str, float]:
    """The untuned base, the run's exports, blank pictures, the VAE's versions; and the part of the gap closed."""
    import torch

    from runner.base.files import BUILTIN
    from runner.data import tokens
    from runner.export import formats, pipeline
    from runner.model import libraries
    from runner.model.base import Base
    from runner.runs.spec_file import read_spec

    libraries.quiet()
    spec = read_spec(folder / "spec.toml")
    base = Base(BUILTIN["builtin:tiny"], None, torch.device("cpu"), torch.float32)
    known = tokens.placeholders(spec.tokens)
    shots = [(prompt, 1000 + index) for index, prompt in enumerate(prompts("TOK"))]
    made = {}
    for name, exported in (("untuned", None), ("trained", formats.exported_files(folder / "export", spec.name, known))):
        images = pipeline.draw_samples(base, exported, shots, length=32, steps=steps, size=64)
        made[name] = score([np.asarray(image) for image in images])
    made |= {"blank": score(blank()), "vae": score(reconstructions(base.folder))}
    start = max(made["untuned"], made["blank"])
    made["gap_closed"] = (made["trained"] - start) / (made["vae"] - start)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs")
    parser.add_argument("--pictures", type=Path, nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.pictures:
        print(f"{score([np.asarray(Image.open(path).convert('RGB')) for path in given.pictures]):.3f}")
    for run in given.runs:
        found = score_run(run, given.steps)
        print(
            json.dumps({"run": str(run), **found})
            if given.json
            else f"{run}: " + "  ".join(f"{k} {v:.3f}" for k, v in found.items())
        )


if __name__ == "__main__":
    main()
