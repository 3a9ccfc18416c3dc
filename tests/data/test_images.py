"""Decoding and cropping pictures, and which are held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.core.errors import FluxrunError
from runner.data.images import Picture, cropped_pixels, decode, measure
from tests.support.paths import PICTURES
from tests.support.picture_folders import pairs, read


def test_a_held_out_picture_is_not_trained_on_whatever_the_seed() -> None:
    whole = read(PICTURES)
    parted = whole.hold_out(3)
    assert len(parted.held_out) == 3
    assert Counter(pairs(whole)) == Counter(pairs(parted) + [(one.name, one.caption) for one in parted.held_out])
    assert parted == whole.hold_out(3)
    assert {one.name for one in parted.held_out} < {one.name for one in whole.hold_out(4).held_out}


def cut(image: Image.Image, size: tuple[int, int] = (64, 64), **more: object) -> np.ndarray:
    settings = {"variant": 0, "variants": 1, "center": False, "flip": False, "interpolation": "lanczos", "seed": 0}
    return cropped_pixels(image, "x", size, **{**settings, **more})  # type: ignore[arg-type]


RAMP = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))


def test_crops_cover_the_size_and_are_seeded() -> None:
    assert cut(RAMP).shape == (64, 64, 3)
    assert cut(RAMP, (48, 96)).shape == (96, 48, 3)
    assert np.array_equal(cut(RAMP), cut(RAMP))
    assert any(not np.array_equal(cut(RAMP), cut(RAMP, seed=seed)) for seed in range(1, 5))
    assert len({cut(RAMP, variant=variant, variants=8).tobytes() for variant in range(8)}) > 4
    middle = cut(RAMP, center=True)
    assert abs(float(middle.mean()) - 99.5) < 1
    assert np.array_equal(middle, cut(RAMP, variant=None))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8))
    assert not np.array_equal(cut(noise, interpolation="nearest"), cut(noise))


def test_every_other_variant_is_mirrored() -> None:
    middle = cut(RAMP, center=True)
    turned = [not np.array_equal(cut(RAMP, center=True, flip=True, variant=v, variants=4), middle) for v in range(4)]
    assert turned in ([True, False, True, False], [False, True, False, True])
    assert np.array_equal(cut(RAMP, center=True, flip=True, variant=turned.index(True), variants=4), middle[:, ::-1])
    assert np.array_equal(cut(RAMP, variant=None, flip=True), middle)


def picture(path: Path) -> Picture:
    [found] = [one for one in read(path.parent, prompt="a").items if one.name == path.name]
    return found


def test_pictures_are_decoded_upright_and_in_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (64, 128), "white").save(tmp_path / "turned.jpg", exif=exif)
    assert decode(picture(tmp_path / "turned.jpg")).size == (128, 64)
    assert measure(picture(tmp_path / "turned.jpg")) == (128, 64)

    grey = Image.fromarray(np.full((64, 64), 128 << 8, np.uint16))
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    see_through = palette.copy()
    see_through.info["transparency"] = 1
    wanted = {
        "grey16.png": (grey, (128, 128, 128)),
        "grey16.tif": (grey, (128, 128, 128)),
        "palette.png": (palette, (10, 200, 30)),
        "palette_clear.png": (see_through, (255, 255, 255)),
        "alpha.png": (Image.new("RGBA", (64, 64), (255, 0, 0, 0)), (255, 255, 255)),
        "half.png": (Image.new("RGBA", (64, 64), (255, 0, 0, 128)), (255, 127, 127)),
        "grey_alpha.png": (Image.new("LA", (64, 64), (0, 0)), (255, 255, 255)),
        "one_bit.png": (Image.new("1", (64, 64), 1), (255, 255, 255)),
        "print.jpg": (Image.new("CMYK", (64, 64), (0, 0, 0, 0)), (255, 255, 255)),
    }
    for name, (image, colour) in wanted.items():
        image.save(tmp_path / name)
        found = decode(picture(tmp_path / name))
        assert (found.mode, found.getpixel((5, 5))) == ("RGB", colour), name


def test_a_truncated_image_is_refused_by_name(tmp_path: Path) -> None:
    whole = (PICTURES / "01.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FluxrunError, match=r"1.png: not a readable image \(.*\); repair it, or remove it"):
        decode(picture(tmp_path / "1.png"))
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(FluxrunError, match=r"1.png: not a readable image"):
        measure(picture(tmp_path / "1.png"))
