"""Draws the training loss. Equal points give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 320, 64, 32, 16, 36
LINE, GRID = "#3465a4", "#dddddd"


def draw_curve(points: Sequence[Sequence[float]], title: str) -> Image.Image:
    """A picture of the loss by step. points: [step, loss], with ascending steps; at least one."""
    steps, losses = [point[0] for point in points], [point[1] for point in points]
    last, low, high = max(steps), min(losses), max(losses)
    if high == low:
        low, high = low - 0.5, high + 0.5
    out = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(out)

    def place(step: float, loss: float) -> tuple[float, float]:
        across = (step - steps[0]) / max(last - steps[0], 1)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    pen.text((LEFT, 8), title, fill="black", font_size=14)
    for part in range(5):
        loss = low + (high - low) * part / 4
        height = place(steps[0], loss)[1]
        pen.line([(LEFT, height), (WIDTH - RIGHT, height)], fill=GRID)
        pen.text((LEFT - 8, height), f"{loss:.3f}", fill="black", font_size=12, anchor="rm")
    for step in sorted({round(steps[0] + (last - steps[0]) * part / 4) for part in range(5)}):
        anchor = "rt" if step == last else "mt"
        pen.text((place(step, low)[0], HEIGHT - BOTTOM + 8), str(step), fill="black", font_size=12, anchor=anchor)
    line = [place(step, loss) for step, loss in zip(steps, losses, strict=True)]
    pen.line(line, fill=LINE, width=2, joint="curve")
    if len(line) == 1:
        pen.ellipse((line[0][0] - 3, line[0][1] - 3, line[0][0] + 3, line[0][1] + 3), fill=LINE)
    return out
