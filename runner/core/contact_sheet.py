"""Contact sheets: pictures in a grid, for comparing by eye."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

CELL = 192  # pixels, the side of a picture
MARGIN = 8
CAPTION = 22  # the height of a line of text


def draw_contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """Draw a sheet. rows: (caption, a picture per column); columns: their titles. Pictures are resized to squares."""
    width = MARGIN + len(columns) * (CELL + MARGIN)
    height = CAPTION + len(rows) * (CELL + CAPTION + MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((MARGIN + column * (CELL + MARGIN), 5), title, fill="black", font_size=14)
    for row, (caption, pictures) in enumerate(rows):
        top = CAPTION + row * (CELL + CAPTION + MARGIN)
        for column, picture in enumerate(pictures):
            resized = picture.resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(resized, (MARGIN + column * (CELL + MARGIN), top))
        draw.text((MARGIN, top + CELL + 3), caption, fill="black", font_size=13)
    return sheet
