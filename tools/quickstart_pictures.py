"""Draw the quickstart's ten pictures, with their captions beside them.

python tools/quickstart_pictures.py specs/quickstart
"""

from __future__ import annotations

import sys
from pathlib import Path

import tiny_world as world

# (size, background, place); every background and place, small and large alike
SCENES = (
    ("", "white", "in the middle"),
    ("large", "black", "in the middle"),
    ("", "sky", "on the left"),
    ("small", "cream", "on the right"),
    ("", "navy", "at the top"),
    ("small", "gray", "at the bottom"),
    ("small", "maroon", "on the left"),
    ("large", "mint", "on the right"),
    ("small", "white", "at the top"),
    ("large", "gray", "at the bottom"),
)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for index, (size, background, place) in enumerate(SCENES):
        thing, where = f"{size} TOK".strip(), f" {place}"
        caption = world.TEMPLATES[index % len(world.TEMPLATES)].format(thing=thing, background=background, place=where)
        picture = world.concept(world.PLACES[place], world.SIZES[size], world.BACKGROUNDS[background])
        picture.save(folder / f"{index + 1:02d}.png")
        (folder / f"{index + 1:02d}.txt").write_text(caption + "\n")


if __name__ == "__main__":
    main()
