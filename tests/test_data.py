"""Where pictures come from, and which of them training sees when."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import PICTURES
from PIL import Image

from runner.core.errors import FluxrunError
from runner.data import buckets, sources
from runner.data.images import DataError, Picture, Pictures, decode, measure, pixels
from runner.data.sources import DatasetSource


def folder(tmp_path: Path) -> Path:
    for index, size in enumerate([(80, 64), (64, 100), (64, 64)]):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (*size, 3), np.uint8)).save(
            tmp_path / f"{index}.png"
        )
    return tmp_path


def read(text: Path, **more: str | None) -> Pictures:
    facts: dict[str, str | None] = {
        "config": None, "split": "train", "image_column": "image", "caption_column": None, "prompt": None, **more,
    }  # fmt: skip
    return sources.read_source(DatasetSource(str(text), **facts))  # type: ignore[arg-type]


def pairs(found: Pictures) -> list[tuple[str, str]]:
    return [(picture.name, picture.caption) for picture in found.items]


# ---- folders -------------------------------------------------------------------------------------------------------


def test_captions_beside_images_and_the_prompt_for_the_rest(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "0.txt").write_text("  a TOK\n on a hill ")
    (tmp_path / "notes.md").write_text("not an image")
    assert pairs(read(tmp_path, prompt="a TOK")) == [
        ("0.png", "a TOK on a hill"),
        ("1.png", "a TOK"),
        ("2.png", "a TOK"),
    ]
    with pytest.raises(DataError, match=r"2 of 3 images have no caption \(1.png, 2.png\); set data.prompt"):
        read(tmp_path)


ROWS = [
    {"file_name": "1.png", "text": "one", "picture": "2.png"},
    {"file_name": "0.png", "text": "", "picture": "1.png"},
    {"file_name": "2.png", "text": None, "picture": "0.png"},
]


def write_metadata(path: Path, kind: str) -> None:
    target = path / f"metadata.{kind}"
    if kind == "jsonl":
        target.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "csv":
        with target.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), target)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_an_imagefolders_metadata(tmp_path: Path, kind: str) -> None:
    folder(tmp_path)
    write_metadata(tmp_path, kind)
    wanted = [("1.png", "one"), ("0.png", "a TOK"), ("2.png", "a TOK")]
    places = {"jsonl": "lines 1, 2, 3", "csv": "lines 2, 3, 4", "parquet": "rows 0, 1, 2"}
    assert pairs(read(tmp_path, caption_column="text", prompt="a TOK")) == wanted
    other = read(tmp_path, image_column="picture", caption_column="text", prompt="a TOK")
    assert [name for name, _ in pairs(other)] == ["2.png", "1.png", "0.png"]
    with pytest.raises(DataError, match=f"data.caption_column to one of metadata.{kind}'s: picture, text"):
        read(tmp_path)
    with pytest.raises(
        DataError,
        match=rf"metadata.{kind}: no column 'txt' in 3 rows \({places[kind]}\); there are file_name, picture, text",
    ):
        read(tmp_path, caption_column="txt", prompt="a TOK")


def test_a_column_that_nothing_has_is_refused(tmp_path: Path) -> None:
    """Else every image would silently get the prompt."""
    with pytest.raises(DataError, match=r"has no metadata.jsonl, .*, so no column 'text'; add one of them, or take"):
        read(folder(tmp_path), caption_column="text", prompt="a TOK")


def test_a_key_that_a_folder_cannot_honour_is_refused(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(DataError, match=r"is a folder of images, which has no data.split \(found 'test'\)"):
        read(tmp_path, split="test", prompt="a TOK")
    with pytest.raises(DataError, match=r"has no data.config \(found 'small'\); take that key out"):
        read(tmp_path, config="small", prompt="a TOK")
    with pytest.raises(DataError, match="so no column 'img'; add one of them, or take data.image_column out"):
        read(tmp_path, image_column="img", prompt="a TOK")
    write_metadata(tmp_path, "jsonl")
    with pytest.raises(
        DataError, match=r"no file named in 'img' in 3 rows \(lines 1, 2, 3\); wanted is a column file_name"
    ):
        read(tmp_path, image_column="img", prompt="a TOK")


def test_text_as_other_systems_write_it(tmp_path: Path) -> None:
    """A byte-order mark, and a line separator inside a JSON text."""
    folder(tmp_path)
    (tmp_path / "0.txt").write_text("\ufeffa TOK", encoding="utf-8")
    assert read(tmp_path, prompt="a hill").captions == ("a TOK", "a hill")
    (tmp_path / "metadata.jsonl").write_text('\ufeff{"file_name": "0.png", "text": "a\u2028TOK"}\r\n', encoding="utf-8")
    assert read(tmp_path, caption_column="text").captions == ("a\u2028TOK",)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("\ufefffile_name,text\r\n0.png,a TOK\r\n", encoding="utf-8", newline="")
    assert read(tmp_path, caption_column="text").captions == ("a TOK",)


def test_an_image_listed_twice_is_refused(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*ROWS, {**ROWS[0], "text": "other"}])))
    with pytest.raises(DataError, match=r"metadata.jsonl:4: a picture named a second time \(found '1.png'\); give"):
        read(tmp_path, caption_column="text", prompt="a TOK")


def test_more_pictures_than_open_files_are_allowed(tmp_path: Path) -> None:
    import resource

    for index in range(80):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{index}.png")
    found = read(tmp_path, prompt="a")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, limits[1]))
    try:
        kept = [(measure(one), decode(one)) for one in found.items]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(kept) == 80


@pytest.mark.parametrize("escape", ["../x.png", "/etc/hostname", "none.png"])
def test_metadata_cannot_name_files_outside(tmp_path: Path, escape: str) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps({"file_name": escape}))
    with pytest.raises(DataError, match="no such file in the folder"):
        read(tmp_path / "in", prompt="a")


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(PICTURES, tmp_path / name)
    prints = [read(tmp_path / name).fingerprint for name in ("a", "b")]
    assert prints[0] == prints[1]
    (tmp_path / "b" / "01.txt").write_text("another caption")
    assert read(tmp_path / "b").fingerprint != prints[0]


def test_a_held_out_picture_is_not_trained_on_whatever_the_seed() -> None:
    whole = read(PICTURES)
    parted = whole.hold_out(3)
    assert len(parted.held) == 3
    assert Counter(pairs(whole)) == Counter(pairs(parted) + [(one.name, one.caption) for one in parted.held])
    assert parted == whole.hold_out(3)
    assert {one.name for one in parted.held} < {one.name for one in whole.hold_out(4).held}


# ---- `datasets` ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> object:
    """A columnar data set with images inside, of two rows; the second has no caption."""
    import datasets

    images = [Image.open(PICTURES / f"{index:02d}.png") for index in (1, 2)]
    return datasets.Dataset.from_dict(
        {"img": images, "text": ["a TOK", None], "number": [1, 2]},
        features=datasets.Features(
            {"img": datasets.Image(), "text": datasets.Value("string"), "number": datasets.Value("int32")}
        ),
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.mark.parametrize("kind", ["file", "folder", "saved", "dict"])
def test_a_columnar_data_set_with_images_inside(tmp_path: Path, kind: str, rows: object) -> None:
    import datasets

    assert isinstance(rows, datasets.Dataset)
    path = tmp_path / "set"
    path.mkdir()
    if kind == "saved":
        rows.save_to_disk(str(path))
    elif kind == "dict":
        datasets.DatasetDict({"train": rows}).save_to_disk(str(path))
    else:
        rows.to_parquet(str(path / "train.parquet"))
        path = path / "train.parquet" if kind == "file" else path
    columns = {"image_column": "img", "caption_column": "text"}
    found = read(path, **columns, prompt="a prompt")
    assert [picture.caption for picture in found.items] == ["a TOK", "a prompt"]
    with Image.open(PICTURES / "02.png") as wanted:
        assert np.array_equal(np.asarray(decode(found.items[1])), np.asarray(wanted.convert("RGB")))
    with pytest.raises(DataError, match="has no column 'image'; there are img, text, number"):
        read(path, prompt="a")
    with pytest.raises(DataError, match=r"number is not text \(rows 0, 1\)"):
        read(path, image_column="img", caption_column="number", prompt="a")


def test_a_configuration_and_a_split_choose_their_rows(tmp_path: Path, rows: object) -> None:
    import datasets

    assert isinstance(rows, datasets.Dataset)
    for name in ("small", "large"):
        for split in ("train", "test"):
            (tmp_path / name).mkdir(exist_ok=True)
            chosen = rows.map(lambda row, said=f"{name} {split}": {"text": said})
            chosen.to_parquet(str(tmp_path / name / f"{split}.parquet"))
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train.parquet\n"
        f"  - split: test\n    path: {name}/test.parquet\n"
        for name in ("small", "large")
    )
    (tmp_path / "README.md").write_text(card + "---\n")
    columns = {"image_column": "img", "caption_column": "text"}
    assert read(tmp_path, config="large", split="test", **columns).captions == ("large test",)
    assert read(tmp_path, config="small", **columns).captions == ("small train",)
    with pytest.raises(DataError, match="cannot be loaded"):
        read(tmp_path, config="small", split="none", **columns)


def test_a_hub_data_set_that_cannot_be_had_is_named() -> None:
    with pytest.raises(DataError, match="nobody/nothing cannot be loaded"):
        read(Path("nobody/nothing"), prompt="a")


# ---- pixels --------------------------------------------------------------------------------------------------------


def cut(image: Image.Image, size: tuple[int, int] = (64, 64), **more: object) -> np.ndarray:
    settings = {"variant": 0, "variants": 1, "center": False, "flip": False, "interpolation": "lanczos", "seed": 0}
    return pixels(image, "x", size, **{**settings, **more})  # type: ignore[arg-type]


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


def test_a_picture_is_upright_and_rgb_whatever_it_was(tmp_path: Path) -> None:
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


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    whole = (PICTURES / "01.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FluxrunError, match=r"1.png: not a readable image \(.*\); mend it or take it out"):
        decode(picture(tmp_path / "1.png"))
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(FluxrunError, match=r"1.png: not a readable image"):
        measure(picture(tmp_path / "1.png"))


# ---- buckets and batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [64, 512, 768, 1024])
def test_buckets_are_those_of_diffusers(side: int) -> None:
    from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets

    ours = buckets.bucket_sizes(side)
    theirs = generate_aspect_ratio_buckets(side)
    assert [(height, width) for width, height in ours] == theirs
    draw = np.random.default_rng(side)
    for _ in range(300):
        width, height = (int(length) for length in draw.integers(100, 4000, 2))
        at = find_nearest_bucket(height, width, theirs)
        assert buckets.nearest_bucket((width, height), ours) == ours[at]


def test_groups_hold_every_picture_once_per_resolution() -> None:
    sizes = [(640, 480), (480, 640), (500, 500), (1000, 100)]
    assert buckets.group_by_bucket(sizes, (64,), buckets=False) == {(64, 64): (0, 1, 2, 3)}
    assert buckets.group_by_bucket(sizes, (64, 32), buckets=False) == {(32, 32): (0, 1, 2, 3), (64, 64): (0, 1, 2, 3)}
    bucketed = buckets.group_by_bucket(sizes, (512,), buckets=True)
    assert bucketed == {(448, 592): (1,), (512, 512): (2,), (592, 448): (0,), (720, 368): (3,)}


COUNTS = {(64, 64): 5, (48, 80): 2, (80, 48): 1}


def test_batches_show_every_view_equally_often_and_never_mix_sizes() -> None:
    seen: Counter[tuple[buckets.Size, int]] = Counter()
    epochs: dict[tuple[buckets.Size, int], list[int]] = {}
    for step in range(24):  # three cycles of eight, of three pictures each
        for micro in range(2):
            size, shown = buckets.draw_batch(0, step, micro, images=3, accumulate=2, counts=COUNTS)
            assert len(shown) == 3
            for index, epoch in shown:
                assert 0 <= index < COUNTS[size]
                seen[size, index] += 1
                epochs.setdefault((size, index), []).append(epoch)
    assert set(seen.values()) == {2 * 24 * 3 // 8}
    assert set(seen) == {(size, index) for size, count in COUNTS.items() for index in range(count)}
    assert all(found == sorted(set(found)) for found in epochs.values())  # the n-th showing is told as the n-th


def test_one_size_is_shuffled_epochs_laid_end_to_end() -> None:
    counts = {(64, 64): 9}
    drawn = [
        buckets.draw_batch(0, step, micro, images=3, accumulate=2, counts=counts)
        for step in range(21)
        for micro in range(2)
    ]
    shown = [index for _, batch in drawn for index, _ in batch]
    epochs = [shown[start : start + 9] for start in range(0, 126, 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert buckets.draw_batch(1, 0, 0, images=9, accumulate=1, counts=counts)[1] != [(index, 0) for index in epochs[0]]
    other = buckets.draw_batch(0, 0, 0, images=9, accumulate=1, counts=counts, what="class")[1]
    assert other != [(index, 0) for index in epochs[0]]


def test_variants_take_turns() -> None:
    for name in ("a", "b", "c"):
        first = buckets.variant(0, name, 0, 4)
        assert [buckets.variant(0, name, shown, 4) for shown in range(6)] == [(first + shown) % 4 for shown in range(6)]
