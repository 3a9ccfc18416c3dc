"""Thumbnails of the results page."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from runner.report.thumbnails import Thumbnails, spread_evenly


def test_thumbs_are_made_once_and_forgotten_with_their_picture(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.effect_noise((640, 480), 40).save(picture)
    thumbs = Thumbnails(tmp_path)
    small = thumbs.read(picture)
    assert small is not None
    with Image.open(io.BytesIO(small)) as opened:
        assert (opened.format, opened.size) == ("WEBP", (160, 120))
    [made] = (tmp_path / ".thumbs").iterdir()
    made.write_bytes(b"from the cache")
    assert thumbs.read(picture) == b"from the cache"
    picture.write_bytes(b"no picture")
    again = Thumbnails(tmp_path)
    assert again.read(picture) is None
    again.remove_unused()
    assert not list((tmp_path / ".thumbs").iterdir())


def test_steps_are_chosen_evenly() -> None:
    assert spread_evenly([5, 1, 3], 3) == [1, 3, 5]
    assert spread_evenly(range(0, 101), 5) == [0, 25, 50, 75, 100]
    assert spread_evenly(range(10), 2) == [0, 9]
    assert spread_evenly(range(10), 1) == [9]
