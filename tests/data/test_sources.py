"""Where pictures come from: folders, metadata files, data sets."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.data.images import DataError, decode, measure
from tests.support.paths import PICTURES
from tests.support.picture_folders import folder, pairs, read

# ---- folders -------------------------------------------------------------------------------------------------------


def test_captions_come_from_text_files_else_the_prompt(tmp_path: Path) -> None:
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


ROWS: list[dict[str, str | None]] = [
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
        match=rf"metadata.{kind}: no column 'txt', in 3 rows \({places[kind]}\); the columns are file_name, picture, text",
    ):
        read(tmp_path, caption_column="txt", prompt="a TOK")


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    """Else every image would silently get the prompt."""
    with pytest.raises(DataError, match=r"has no metadata.jsonl, .*, so no column 'text'; add one of them, or remove"):
        read(folder(tmp_path), caption_column="text", prompt="a TOK")


def test_keys_that_do_not_apply_to_a_folder_are_refused(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(DataError, match=r"is a folder of images, which has no data.split, got 'test'"):
        read(tmp_path, split="test", prompt="a TOK")
    with pytest.raises(DataError, match=r"has no data.config, got 'small'; remove that key"):
        read(tmp_path, config="small", prompt="a TOK")
    with pytest.raises(DataError, match="so no column 'img'; add one of them, or remove data.image_column"):
        read(tmp_path, image_column="img", prompt="a TOK")
    write_metadata(tmp_path, "jsonl")
    with pytest.raises(DataError, match=r"no file named in 'img', in 3 rows \(lines 1, 2, 3\); add a column file_name"):
        read(tmp_path, image_column="img", prompt="a TOK")


def test_line_ends_and_byte_order_marks_of_other_systems(tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match=r"metadata.jsonl:4: a second row for a picture, got '1.png'; give"):
        read(tmp_path, caption_column="text", prompt="a TOK")


def test_a_folder_may_hold_more_pictures_than_open_files_are_allowed(tmp_path: Path) -> None:
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


def test_the_fingerprint_depends_on_content_not_location(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(PICTURES, tmp_path / name)
    prints = [read(tmp_path / name).fingerprint for name in ("a", "b")]
    assert prints[0] == prints[1]
    (tmp_path / "b" / "01.txt").write_text("another caption")
    assert read(tmp_path / "b").fingerprint != prints[0]


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
    with pytest.raises(DataError, match="has no column 'image'; the columns are img, text, number"):
        read(path, prompt="a")
    with pytest.raises(DataError, match=r"number is not text \(rows 0, 1\)"):
        read(path, image_column="img", caption_column="number", prompt="a")


def test_configuration_and_split_select_rows(tmp_path: Path, rows: object) -> None:
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


def test_a_hub_data_set_that_cannot_be_loaded_is_named() -> None:
    with pytest.raises(DataError, match="nobody/nothing cannot be loaded"):
        read(Path("nobody/nothing"), prompt="a")


# ---- pixels --------------------------------------------------------------------------------------------------------


# ---- buckets and batches -------------------------------------------------------------------------------------------
