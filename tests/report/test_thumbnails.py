"""Thumbnails of the results page."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from runner.report.thumbnails import Thumbs, evenly


def test_thumbs_are_made_once_and_forgotten_with_their_picture(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.effect_noise((640, 480), 40).save(picture)
    thumbs = Thumbs(tmp_path)
    small = thumbs.of(picture)
    assert small is not None
    with Image.open(io.BytesIO(small)) as opened:
        assert (opened.format, opened.size) == ("WEBP", (160, 120))
    [made] = (tmp_path / ".thumbs").iterdir()
    made.write_bytes(b"from the cache")
    assert thumbs.of(picture) == b"from the cache"
    picture.write_bytes(b"no picture")
    again = Thumbs(tmp_path)
    assert again.of(picture) is None
    again.forget_others()
    assert not list((tmp_path / ".thumbs").iterdir())


def test_steps_are_chosen_evenly() -> None:
    assert evenly([5, 1, 3], 3) == [1, 3, 5]
    assert evenly(range(0, 101), 5) == [0, 25, 50, 75, 100]
    assert evenly(range(10), 2) == [0, 9]
    assert evenly(range(10), 1) == [9]
