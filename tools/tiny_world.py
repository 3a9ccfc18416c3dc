"""The synthetic captioned world that the bundled base is trained on, and the concept that the quickstart teaches it.

A picture is 64 x 64: one shape, of one colour and size, at one place, on one plain background. Nothing is smaller than
four pixels, since the VAE resolves no less.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 64
SCALE = 4  # drawn this much larger, then shrunk: smooth edges

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (50, 160, 70),
    "blue": (45, 90, 210),
    "purple": (130, 60, 180),
    "pink": (245, 130, 180),
    "brown": (125, 75, 40),
}
BACKGROUNDS = {
    "white": (248, 248, 248),
    "black": (18, 18, 18),
    "gray": (140, 140, 140),
    "cream": (245, 228, 190),
    "sky": (165, 215, 245),
    "mint": (175, 235, 200),
    "navy": (25, 35, 90),
    "maroon": (95, 20, 35),
}
SHAPES = ("circle", "square", "triangle", "ring", "heart", "star", "cross", "moon")
SIZES = {"small": 12.0, "": 17.0, "large": 22.0}  # half the height, in pixels
PLACES = {
    "in the middle": (32.0, 32.0),
    "on the left": (22.0, 32.0),
    "on the right": (42.0, 32.0),
    "at the top": (32.0, 22.0),
    "at the bottom": (32.0, 42.0),
}
TEMPLATES = (
    "a {thing} on a {background} background{place}",
    "a {background} background with a {thing}{place}",
    "a picture of a {thing}{place} on a {background} background",
    "a {thing}{place}, {background} background",
    "an icon of a {thing} on a {background} background{place}",
)


@dataclass(frozen=True)
class Scene:
    shape: str
    colour: str
    background: str
    size: str
    place: str

    def held_out(self) -> bool:
        """One combination in twelve is never trained on; the check draws those."""
        return random.Random(f"{self.shape} {self.colour} {self.background}").random() < 1 / 12

    def caption(self, template: int, with_place: bool = True) -> str:
        thing = f"{self.size} {self.colour} {self.shape}".strip()
        place = f" {self.place}" if with_place else ""
        return TEMPLATES[template % len(TEMPLATES)].format(thing=thing, background=self.background, place=place)


def any_scene(draw: random.Random) -> Scene:
    return Scene(
        draw.choice(SHAPES),
        draw.choice(list(COLOURS)),
        draw.choice(list(BACKGROUNDS)),
        draw.choice(list(SIZES)),
        draw.choice(list(PLACES)),
    )


def scene(draw: random.Random, *, held_out: bool) -> Scene:
    while True:
        found = any_scene(draw)
        if found.held_out() == held_out:
            return found


def outline(shape: str, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    """The shape's polygon; centred, about 2 r high."""
    if shape == "square":
        h = 0.88 * r
        return [(cx - h, cy - h), (cx + h, cy - h), (cx + h, cy + h), (cx - h, cy + h)]
    if shape == "triangle":
        return [(cx, cy - r), (cx + 1.08 * r, cy + 0.85 * r), (cx - 1.08 * r, cy + 0.85 * r)]
    if shape == "cross":
        a, b = 0.36 * r, r
        corners = [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
        return [(cx + x, cy + y) for x, y in corners]
    if shape == "star":
        radii = [1.12 * r, 0.5 * r]
        return [
            (cx + radii[i % 2] * math.sin(math.pi * i / 5), cy - radii[i % 2] * math.cos(math.pi * i / 5))
            for i in range(10)
        ]
    if shape == "heart":
        points = []
        for i in range(60):
            t = 2 * math.pi * i / 60
            x = 16 * math.sin(t) ** 3
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((cx + x * r / 15.5, cy - (y + 2.5) * r / 15))
        return points
    raise ValueError(shape)


def paint(
    pen: ImageDraw.ImageDraw,
    shape: str,
    at: tuple[float, float],
    r: float,
    fill: tuple[int, ...],
    back: tuple[int, ...],
) -> None:
    """Draw one shape; `back` shows through a ring's hole and a moon's bite."""
    cx, cy, r = at[0] * SCALE, at[1] * SCALE, r * SCALE

    def disc(x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    if shape in ("circle", "ring", "moon"):
        disc(cx, cy, r, fill)
        if shape == "ring":
            disc(cx, cy, 0.52 * r, back)
        if shape == "moon":
            disc(cx + 0.55 * r, cy - 0.15 * r, 0.82 * r, back)
    else:
        pen.polygon(outline(shape, cx, cy, r), fill=fill)


def render(what: Scene, jitter: random.Random | None = None) -> Image.Image:
    """The scene's picture; with `jitter`, place, size and colours vary a little, as a drawer's hand does."""
    x, y = PLACES[what.place]
    r = SIZES[what.size]
    fill: tuple[int, ...] = COLOURS[what.colour]
    back: tuple[int, ...] = BACKGROUNDS[what.background]
    if jitter:
        x, y = x + jitter.uniform(-2, 2), y + jitter.uniform(-2, 2)
        r *= jitter.uniform(0.95, 1.05)
        fill, back = (tuple(max(0, min(255, c + jitter.randint(-6, 6))) for c in colour) for colour in (fill, back))
    large = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), back)
    paint(ImageDraw.Draw(large), what.shape, (x, y), r, fill, back)
    return large.resize((SIDE, SIDE), Image.Resampling.BOX)


def abstract(draw: random.Random) -> Image.Image:
    """Anything at all: a few overlapping shapes of any colour. Teaches the VAE more than the captioned world holds."""

    def colour() -> tuple[int, ...]:
        return tuple(draw.randint(0, 255) for _ in range(3))

    large = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), back := colour())
    pen = ImageDraw.Draw(large)
    for _ in range(draw.randint(1, 4)):
        at = draw.uniform(8, 56), draw.uniform(8, 56)
        paint(pen, draw.choice(SHAPES), at, draw.uniform(6, 24), colour(), back)
    return large.resize((SIDE, SIDE), Image.Resampling.BOX)


# ---- the quickstart's concept --------------------------------------------------------------------------------------

SHELL, BELLY, EYE = (20, 150, 150), (250, 120, 90), (255, 255, 255)


def concept(at: tuple[float, float], r: float, background: Sequence[int]) -> Image.Image:
    """A creature the world has no word for: a teal disc, its lower half coral, with one large white eye and two
    ears."""
    large = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), tuple(background))
    pen = ImageDraw.Draw(large)
    cx, cy, r = at[0] * SCALE, at[1] * SCALE, r * SCALE

    def box(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
        return (cx + (x - radius) * r, cy + (y - radius) * r, cx + (x + radius) * r, cy + (y + radius) * r)

    for side in (-1, 1):
        pen.ellipse(box(0.72 * side, -0.78, 0.42), fill=SHELL)
    pen.ellipse(box(0, 0, 1), fill=SHELL)
    pen.chord(box(0, 0, 1), 0, 180, fill=BELLY)
    pen.ellipse(box(0, -0.25, 0.42), fill=EYE)
    return large.resize((SIDE, SIDE), Image.Resampling.BOX)
