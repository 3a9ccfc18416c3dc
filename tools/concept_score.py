"""How well pictures show the quickstart's creature, by a measure that is no loss: distance to the best-fitting drawing.

    python tools/concept_score.py runs/quickstart          a finished run: before, after, floor and ceiling
    python tools/concept_score.py --pictures a.png b.png   pictures alone

A picture's distance is the mean absolute error (of 255) to the best of 1,352 drawings of the creature over place and
size, on the picture's own border colour. Blank pictures give the distance that showing nothing has; the VAE's versions
of real drawings the one that nothing here can beat.
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


@cache
def drawings() -> tuple[Array, Array]:
    """(colour [N, 64 * 64 * 3], coverage [N, 64 * 64, 1]): the creature on black and its outline's coverage."""
    colours, covers = [], []
    for r in range(10, 26, 2):
        for x in range(20, 46, 2):
            for y in range(20, 46, 2):
                on_black = np.asarray(world.concept((x, y), r, (0, 0, 0)), np.float32)
                on_white = np.asarray(world.concept((x, y), r, (255, 255, 255)), np.float32)
                covers.append(1 - (on_white - on_black).mean(-1, keepdims=True).reshape(-1, 1) / 255)
                colours.append(on_black.reshape(-1, 3))
    return np.stack(colours), np.stack(covers)


def distance(picture: Array) -> float:
    """picture [64, 64, 3] uint8."""
    p = picture.astype(np.float32)
    border = np.concatenate(
        [p[:2].reshape(-1, 3), p[-2:].reshape(-1, 3), p[:, :2].reshape(-1, 3), p[:, -2:].reshape(-1, 3)]
    )
    back = np.median(border, 0)
    colours, covers = drawings()
    flat = p.reshape(-1, 3)
    best = 255.0
    for start in range(0, len(colours), 128):  # in parts: the whole is 66 MB a copy
        made = colours[start : start + 128] + (1 - covers[start : start + 128]) * back
        best = min(best, float(np.abs(made - flat).mean((1, 2)).min()))
    return best


def score(pictures: Sequence[Array]) -> float:
    """Mean distance, of 255; lower is better."""
    return float(np.mean([distance(picture) for picture in pictures]))


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

    from runner import export, flux, sample, tokens
    from runner.basefiles import BUILTIN
    from runner.rundir import read_spec

    flux.quiet()
    spec = read_spec(folder / "spec.toml")
    base = flux.Base(BUILTIN["builtin:tiny"], None, torch.device("cpu"), torch.float32)
    known = tokens.placeholders([(token.name, token.vectors, token.initializer) for token in spec.tokens])
    shots = [(prompt, 1000 + index) for index, prompt in enumerate(prompts("TOK"))]
    made = {}
    for name, exported in (("untuned", None), ("trained", export.exported_files(folder / "export", spec.name, known))):
        images = sample.sample(base, exported, shots, length=32, steps=steps, size=64)
        made[name] = score([np.asarray(image) for image in images])
    made |= {"blank": score(blank()), "vae": score(reconstructions(base.folder))}
    start = min(made["untuned"], made["blank"])
    made["gap_closed"] = (start - made["trained"]) / (start - made["vae"])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs")
    parser.add_argument("--pictures", type=Path, nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.pictures:
        print(f"{score([np.asarray(Image.open(path).convert('RGB')) for path in given.pictures]):.2f}")
    for run in given.runs:
        found = score_run(run, given.steps)
        print(
            json.dumps({"run": str(run), **found})
            if given.json
            else f"{run}: " + "  ".join(f"{k} {v:.3f}" for k, v in found.items())
        )


if __name__ == "__main__":
    main()
