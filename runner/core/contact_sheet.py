"""Contact sheets: pictures under titles, for comparing by eye. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw


def draw_contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], cell: int = 192
) -> Image.Image:
    """A contact sheet: a caption and a row of pictures each, under the columns' titles."""
    bar, width = 22, len(columns) * (cell + 8) + 8
    out = Image.new("RGB", (width, bar + len(rows) * (cell + bar + 8)), "white")
    pen = ImageDraw.Draw(out)
    for column, title in enumerate(columns):
        pen.text((8 + column * (cell + 8), 5), title, fill="black", font_size=14)
    for index, (caption, pictures) in enumerate(rows):
        top = bar + index * (cell + bar + 8)
        for column, picture in enumerate(pictures):
            sharp = picture.resize((cell, cell), Image.Resampling.BICUBIC)
            out.paste(sharp, (8 + column * (cell + 8), top))
        pen.text((8, top + cell + 3), caption, fill="black", font_size=13)
    return out
