"""How a run's wall time grows with steps, images, captions, resolution and number of specs, each varied alone.

    python tools/bench/growth.py [--model DIR] [--rounds 1] [--vary steps images captions resolution specs] [--few]

Whole processes, `fluxrun queue` on frozen encoders with an empty cache. At the middle of all: 20 steps, 40 images with
one caption, 128 px, one spec; 128 text tokens, batch 1, rank 8, Prodigy. Every picture differs, so each is encoded.
Quoted are seconds, and the seconds that each unit more costs since the row before. `--few`: the least two values of
each.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from bench import PICTURES, Asked, machine, model_in, parser_of, table
from watch import Watched, fluxrun, watch


@dataclass(frozen=True)
class Point:
    steps: int = 20
    images: int = 40
    captions: int = 1
    resolution: int = 128
    specs: int = 1


VALUES = {
    "steps": (10, 20, 40, 80),
    "images": (10, 40, 160),
    "captions": (1, 10, 40),
    "resolution": (64, 128, 256, 512),
    "specs": (1, 2, 4, 8),
}


def fill(folder: Path, images: int, captions: int) -> None:
    """So many pictures, each unlike the others, with so many captions among them."""
    from PIL import Image

    folder.mkdir()
    originals = sorted(PICTURES.glob("*.png"))
    for number in range(images):
        picture = Image.open(originals[number % len(originals)]).convert("RGB")
        picture.putpixel((picture.width // 2, picture.height // 2), (number % 256, number // 256, 0))
        picture.paste(
            (number % 256, 60, number // 256), (picture.width // 2, picture.height // 2, picture.width, picture.height)
        )
        picture.save(folder / f"{number:04}.png")
        (folder / f"{number:04}.txt").write_text(f"a photo of thing number {number % captions}")


def measure(model: Path, point: Point) -> Watched:
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        fill(folder / "pictures", point.images, point.captions)
        (folder / "specs").mkdir()
        for seed in range(point.specs):
            asked = Asked(model, folder / "pictures", point.resolution, steps=point.steps, seed=seed, prompt=None)
            (folder / "specs" / f"s{seed}.toml").write_text(asked.text)
        return watch(fluxrun("queue", "specs", "--gpus", "cpu"), folder, folder / "log")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--vary", nargs="+", choices=tuple(VALUES), default=tuple(VALUES))
    parser.add_argument("--few", action="store_true")
    given = parser.parse_args()
    print(machine())
    rows = [["varied", "value", "wall s", "CPU s", "s for each one more"]]
    with tempfile.TemporaryDirectory() as where:
        model = model_in(given.model, Path(where))
        known: dict[Point, tuple[float, float]] = {}
        for what in given.vary:
            before: tuple[int, float] | None = None
            for value in VALUES[what][: 2 if given.few else None]:
                point = replace(Point(), **{what: value})
                if point not in known:
                    took = [measure(model, point) for _ in range(given.rounds)]
                    known[point] = (
                        statistics.median(one.wall for one in took), statistics.median(one.cpu for one in took)
                    )  # fmt: skip
                wall, cpu = known[point]
                more = f"{(wall - before[1]) / (value - before[0]):.4f}" if before else ""
                rows.append([what, str(value), f"{wall:.1f}", f"{cpu:.1f}", more])
                print(" ".join(rows[-1]), flush=True)
                before = value, wall
    table(rows)


if __name__ == "__main__":
    main()
