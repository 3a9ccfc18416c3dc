"""Which files of a folder are pictures and which captions; what falls out is told, once, with why."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.data import image_formats, images, sources
from runner.data.image_files import scan_folder
from tests.support.house import House
from tests.support.paths import PICTURES, PROJECT


@pytest.fixture
def pics(house: House) -> Path:
    """Two pictures that are read, and a spec `a.toml` that trains on them."""
    house.spec(source='source = "pics"\nprompt = "a TOK"', batch_size="batch_size = 1")
    folder = house.folder / "pics"
    folder.mkdir()
    for index in range(2):
        drawn(folder / f"p{index}.png", index)
    return folder


def drawn(path: Path, seed: int, size: tuple[int, int] = (96, 96), **more: object) -> Path:
    """A picture of its own colours."""
    blocks = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path, **more)  # type: ignore[arg-type]
    return path


def check(house: House, code: int = 0) -> list[str]:
    """What `fluxrun check a.toml` finds, but for the notes about the machine."""
    said = house.fluxrun("check", "a.toml")
    assert said.err == ""
    assert said.code == code, said.out
    return [line for line in said.out.splitlines()[:-1] if not line.startswith(("note: disk", "note: versions"))]


def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_formats, "find_spec", lambda name: None)


SHOWN = "note: a.toml:5: data.source: training pictures: {} at 64x64; 6 steps show each {} times"


# ---- pictures ------------------------------------------------------------------------------------------------------


def test_unused_picture_files_are_reported_with_the_reason(
    house: House, pics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_heif(monkeypatch)
    for name in ("photo.heic", "two.HEIC", "raw.cr2", "drawing.svg", "layers.psd", "new.jxl"):
        (pics / name).write_bytes(b"something")
    (pics / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(pics / "pipe.png")
    (house.folder / "more").mkdir()
    drawn(house.folder / "more" / "p.png", 9)
    (pics / "linked").symlink_to(house.folder / "more")
    (pics / "raw.txt").write_text("its caption is no stray one")
    assert check(house) == [
        "warning: a.toml:5: data.source: 9 files look like pictures and are not used",
        "    dangling.png: a link to a file that is not there",
        "    drawing.svg, layers.psd: a drawing program's own file; save it as PNG",
        "    linked: a link to a folder, which is not searched; put the pictures themselves there",
        "    new.jxl: of a format that is not read; save it as PNG or JPEG",
        '    photo.heic, two.HEIC: HEIC, which needs pillow-heif; pip install "fluxrun[heic]"',
        "    pipe.png: not a regular file",
        "    raw.cr2: a camera's raw file; save it as PNG or JPEG",
        SHOWN.format(2, 3),
    ]


def test_hidden_files_are_skipped(house: House, pics: Path) -> None:
    """AppleDouble files, a notebook's copies, an Explorer's thumbnails: neither used nor counted nor told."""
    (pics / "._p0.png").write_bytes(b"\0\x05\x16\x07")
    (pics / "._p0.txt").write_bytes(b"\0\x05\x16\x07")
    (pics / "Thumbs.db").write_bytes(b"\xd0\xcf")
    (pics / ".ipynb_checkpoints").mkdir()
    shutil.copy(pics / "p0.png", pics / ".ipynb_checkpoints" / "p0-checkpoint.png")
    (pics / "p0.txt").write_text("a TOK")
    assert check(house) == [
        "note: a.toml:5: data.source: training pictures: 2 at 64x64; 6 steps show each 3 times",
        "note: a.toml:6: data.prompt: 1 of 2 pictures have no caption of their own and read data.prompt (p1.png)",
    ]


def test_formats_read(house: House, pics: Path) -> None:
    """An animation's first frame; whatever the case of an ending."""
    drawn(pics / "still.gif", 3)
    drawn(pics / "modern.avif", 4)
    drawn(pics / "web.JFIF", 5, format="JPEG")
    first, second = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    first.save(pics / "moving.gif", save_all=True, append_images=[second])
    assert check(house) == [
        "warning: a.toml:5: data.source: 1 picture animated (moving.gif); only the first frame is used, save others as "
        "pictures of their own",
        SHOWN.format(6, 1),
    ]
    found = {one.name: images.decode(one) for one in sources.read_folder(pics, "image", None, "a").items}
    assert found["moving.gif"].getpixel((5, 5)) == (255, 0, 0)
    with Image.open(pics / "still.gif") as still:
        assert np.array_equal(np.asarray(found["still.gif"]), np.asarray(still.convert("RGB")))


def test_heic_is_read_with_pillow_heif(house: House, pics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a telephone's picture that is JPEG by its name alone."""
    pillow_heif = pytest.importorskip("pillow_heif", reason='needs pip install "fluxrun[heic]"')
    pillow_heif.from_pillow(Image.new("RGB", (64, 64), (200, 40, 40))).save(pics / "photo.heic")
    shutil.copy(pics / "photo.heic", pics / "renamed.jpg")
    assert check(house)[-1] == SHOWN.format(4, 1.5)
    found = {one.name: one for one in sources.read_folder(pics, "image", None, "a").items}
    for name in ("photo.heic", "renamed.jpg"):
        red, green, blue = np.asarray(images.decode(found[name])).reshape(-1, 3).mean(0)
        assert abs(red - 200) + abs(green - 40) + abs(blue - 40) < 12, name
        assert images.measure(found[name]) == (64, 64)
    without_heif(monkeypatch)
    assert check(house, 2)[0] == (
        "error: a.toml:5: data.source: pics/renamed.jpg: not a readable image (HEIC, which needs pillow-heif; pip install "
        '"fluxrun[heic]"); repair it, or remove it from the data'
    )


def test_a_folder_without_readable_pictures_lists_its_files(
    house: House, pics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_heif(monkeypatch)
    for index in range(2):
        (pics / f"p{index}.png").rename(pics / f"p{index}.heic")
    assert check(house, 2)[0] == (
        "error: a.toml:5: data.source: no image in pics; expected files that end in .avif, .bmp, .gif, .jfif, .jpe, .jpeg, "
        '.jpg, .png, .tif, .tiff, .webp; p0.heic, p1.heic: HEIC, which needs pillow-heif; pip install "fluxrun[heic]"'
    )


def test_pictures_not_named_in_the_metadata_are_reported(house: House, pics: Path) -> None:
    (pics / "metadata.jsonl").write_text('{"file_name": "./p0.png", "text": "a TOK"}\n')
    (pics / "p0.txt").write_text("not read")
    assert check(house) == [
        "warning: a.toml:5: data.source: 1 file looks like a picture and is not used",
        "    p1.png: metadata.jsonl does not name it",
        "warning: a.toml:5: data.source: 1 file looks like a caption and is not read",
        "    p0.txt: captions come from metadata.jsonl",
        SHOWN.format(1, 6),
    ]


def test_unused_metadata_files_are_reported(house: House, pics: Path) -> None:
    (pics / "below").mkdir()
    for name in ("metadata.json", "below/metadata.jsonl"):
        (pics / name).write_text("{}")
    only = "only metadata.jsonl, metadata.csv, metadata.parquet are read, in the folder that the spec names"
    assert check(house)[:2] == [
        "warning: a.toml:5: data.source: 2 files look like captions and are not read",
        f"    below/metadata.jsonl, metadata.json: {only}",
    ]
    (pics / "metadata.csv").write_text("file_name,text\np0.png,a TOK\np1.png,a TOK\n")
    (pics / "metadata.jsonl").write_text('{"file_name": "p0.png"}\n{"file_name": "p1.png"}\n')
    assert check(house)[:3] == [
        "warning: a.toml:5: data.source: 3 files look like captions and are not read",
        f"    below/metadata.jsonl, metadata.json: {only}",
        "    metadata.csv: metadata.jsonl is read instead",
    ]


def test_previews_beside_parquet_files_are_ignored(house: House, pics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", house.folder / "datasets")

    rows = {"image": [{"bytes": (pics / "p0.png").read_bytes(), "path": None}], "text": ["a TOK"]}
    for path in pics.iterdir():
        path.unlink()
    Dataset.from_dict(rows).to_parquet(pics / "0.parquet")
    drawn(pics / "preview.gif", 3)
    source = sources.DatasetSource(str(pics), None, "train", "image", "text", None)
    assert [one.name for one in sources.read_source(source).items] == ["000000"]
    drawn(pics / "p0.png", 4)
    source = sources.DatasetSource(str(pics), None, "train", "image", None, "a TOK")
    assert [one.name for one in sources.read_source(source).items] == ["p0.png", "preview.gif"]


def test_class_images_are_scanned_like_training_images(house: House, pics: Path) -> None:
    folder = house.folder / "classes"
    folder.mkdir()
    (folder / "._a.png").write_bytes(b"\0")
    (folder / "raw.nef").write_bytes(b"\0")
    drawn(folder / "a.gif", 7, (32, 32))
    spec = house.folder / "a.toml"
    spec.write_text(spec.read_text() + '[prior]\nimages = "classes"\nprompt = "a dog"\ncount = 3\n')
    assert check(house) == [
        "warning: a.toml:26: prior.images: 1 file looks like a picture and is not used",
        "    raw.nef: a camera's raw file; save it as PNG or JPEG",
        "warning: a.toml:26: prior.images: 1 class image smaller than trained at (64), so enlarged and blurred; name "
        "another folder, for the base to make them as large",
        "    a.gif is 32x32",
        SHOWN.format(2, 3),
        "note: a.toml:26: prior.images: 2 class images are not there yet (found 1 of 3); the base makes them before the "
        "training",
    ]


def test_the_fingerprint_depends_only_on_what_is_read(tmp_path: Path) -> None:
    """By the formula of the first versions: names, captions and bytes of what is read, whatever else lies there."""
    from runner.core.hashing import content_key, sha256_file

    shutil.copytree(PICTURES, tmp_path / "pics")
    (tmp_path / "pics" / "notes.md").write_text("nothing")
    (tmp_path / "pics" / "raw.cr2").write_bytes(b"II*\0")
    names = sorted(path.name for path in PICTURES.glob("*.png"))
    assert len(names) == 10
    facts = [
        [name, (PICTURES / name).with_suffix(".txt").read_text().strip(), sha256_file(PICTURES / name)]
        for name in names
    ]
    found = sources.read_folder(tmp_path / "pics", "image", None, None)
    assert found.fingerprint == content_key("folder", json.dumps(facts))


# ---- captions ------------------------------------------------------------------------------------------------------


def test_caption_endings_in_any_case(house: House, pics: Path) -> None:
    for index in range(2):
        (pics / f"p{index}.TXT").write_text(f"own words {index} of TOK")
    assert check(house) == [SHOWN.format(2, 3)]
    assert sources.read_folder(pics, "image", None, None).captions == ("own words 0 of TOK", "own words 1 of TOK")
    (pics / "p0.txt").write_text("a TOK")
    assert check(house)[:2] == [
        "warning: a.toml:5: data.source: 1 file looks like a caption and is not read",
        "    p0.TXT: p0.txt is read instead",
    ]


def test_unread_caption_files_are_reported(house: House, pics: Path) -> None:
    (pics / "p0.caption").write_text("a TOK on a hill")
    (pics / "p1.json").write_text("{}")
    (pics / "p1.txt").symlink_to("nowhere.txt")
    (pics / "readme.md").write_text("of no picture")
    assert check(house) == [
        "warning: a.toml:5: data.source: 3 files look like captions and are not read",
        "    p1.txt: a link to a file that is not there",
        "    p0.caption, p1.json: of an ending that is not read; rename it to NAME.txt",
        SHOWN.format(2, 3),
    ]
    (house.folder / "a.toml").write_text((house.folder / "a.toml").read_text().replace('prompt = "a TOK"\n', ""))
    assert check(house, 2)[0] == (
        "error: a.toml:5: data.source: 2 of 2 images have no caption (p0.png, p1.png); set data.prompt, or write a "
        "NAME.txt beside each; p1.txt: a link to a file that is not there; p0.caption, p1.json: of an ending that is not "
        "read; rename it to NAME.txt"
    )


def test_two_pictures_that_share_a_caption_file(house: House, pics: Path) -> None:
    drawn(pics / "p0.jpg", 8)
    (pics / "p0.txt").write_text("words of TOK")
    assert check(house) == [
        "warning: a.toml:5: data.source: 1 caption file shared by pictures of one name, each of which takes its caption "
        "from it; rename the pictures, if that was not meant",
        "    p0.jpg and p0.png: p0.txt",
        SHOWN.format(3, 2),
        "note: a.toml:6: data.prompt: 1 of 3 pictures have no caption of their own and read data.prompt (p1.png)",
    ]
    found = sources.read_folder(pics, "image", None, "a TOK").items
    assert [one.caption for one in found] == ["words of TOK", "words of TOK", "a TOK"]


def test_captions_in_another_encoding(house: House, pics: Path) -> None:
    (pics / "p0.txt").write_bytes("a TOK für".encode("utf-16"))
    assert check(house, 2)[0] == (
        "error: a.toml:5: data.source: pics/p0.txt: not UTF-8 but UTF-16; save the file as UTF-8"
    )
    (pics / "p1.txt").write_bytes("a TOK\nfür".encode("latin-1"))
    assert check(house, 2)[0] == (
        "error: a.toml:5: data.source: 2 captions cannot be read (pics/p0.txt: not UTF-8 but UTF-16, pics/p1.txt: not "
        'UTF-8 but probably Windows-1252 or Latin-1 (found byte 0xfc on line 2, there "ü")); save each as UTF-8'
    )
    for path in pics.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + "a TOK für".encode())
    check(house)
    assert sources.read_folder(pics, "image", None, None).captions == ("a TOK für",)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_in_another_encoding(house: House, pics: Path, kind: str) -> None:
    text = {"jsonl": '{"file_name": "p0.png", "text": "für"}\n', "csv": "file_name,text\np0.png,für\n"}[kind]
    (pics / f"metadata.{kind}").write_bytes(text.encode("utf-16"))
    assert check(house, 2)[0] == (
        f"error: a.toml:5: data.source: pics/metadata.{kind}: not UTF-8 but UTF-16; save the file as UTF-8"
    )
    (pics / f"metadata.{kind}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert sources.read_folder(pics, "image", "text", None).captions == ("für",)


# ---- many of one kind ----------------------------------------------------------------------------------------------


def test_one_wrong_column_is_one_fault(house: House, pics: Path) -> None:
    for index in range(2, 20):
        shutil.copy(pics / "p0.png", pics / f"p{index}.png")
    rows = "".join(f'{{"file_name": "p{index}.png", "text": "d"}}\n' for index in range(20))
    (pics / "metadata.jsonl").write_text(rows)
    spec = house.folder / "a.toml"
    spec.write_text(spec.read_text().replace('prompt = "a TOK"', 'caption_column = "txt"'))
    assert check(house, 2) == [
        "error: a.toml:6: data.caption_column: pics/metadata.jsonl: no column 'txt', in 20 rows (lines 1, 2, 3, 4, 5, ...); "
        "the columns are file_name, text"
    ]
    (pics / "metadata.jsonl").write_text(
        rows.replace("p1", "q1").replace('"text"', '"txt"') + '{"file_name": "p0.png", "txt": 3}'
    )
    assert check(house, 2) == [
        "error: a.toml:5: data.source: pics/metadata.jsonl: no such file in the folder, in 11 rows (lines 2: 'q1.png', 11: "
        "'q10.png', 12: 'q11.png', 13: 'q12.png', 14: 'q13.png', ...)",
        "error: a.toml:5: data.source: pics/metadata.jsonl:21: a second row for a picture, got 'p0.png'; give each "
        "picture one row",
        "error: a.toml:6: data.caption_column: pics/metadata.jsonl:21: txt is not text, got 3",
    ]


def test_copies_of_a_picture_are_one_line_per_group(house: House, pics: Path) -> None:
    for index in range(2, 9):
        shutil.copy(pics / "p0.png", pics / f"p{index}.png")
    with Image.open(pics / "p1.png") as image:
        image.resize((120, 120), Image.Resampling.BICUBIC).save(pics / "smaller.jpg", quality=80)
        image.resize((110, 110), Image.Resampling.BICUBIC).save(pics / "small.jpg", quality=80)
    steps = house.folder / "a.toml"
    steps.write_text(steps.read_text().replace("steps = 6", "steps = 11"))
    assert check(house)[:3] == [
        "warning: a.toml:5: data.source: 2 pictures found more than once, so training shows them more often; keep one copy of "
        "each in the data, or ignore this if intended",
        "    p0.png, p2.png, p3.png, p4.png, p5.png and 3 more",
        "    p1.png, small.jpg and smaller.jpg (nearly)",
    ]


def test_a_thousand_copies_are_compared_quickly() -> None:
    from time import process_time

    from runner.preflight.fingerprints import ImageFingerprint, find_duplicates

    thumb = np.zeros((16, 16, 3), np.int16)
    began = process_time()
    [group] = find_duplicates([ImageFingerprint((64, 64), "the same", 5, thumb)] * 3000)
    assert len(group.members) == 3000
    assert process_time() - began < 1


# ---- large pictures ------------------------------------------------------------------------------------------------


def blank(path: Path, width: int, height: int, *, whole: bool = True) -> Path:
    """A PNG of one bit a pixel, without its pixels in memory."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + bytes((width + 7) // 8)
    squeezed = zlib.compress(row * height) if whole else b""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", squeezed) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def test_a_large_scan_is_read_without_warnings(house: House, pics: Path) -> None:
    """Of more pixels than Pillow warns of; and no warning of Pillow's reaches the terminal, of broken EXIF neither."""
    blank(pics / "scan.png", 9500, 9500)
    drawn(pics / "p2.jpg", 2, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12")
    code = "import sys\nfrom runner.cli import main\nmain(['check', 'a.toml'])"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], cwd=house.folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert SHOWN.format(4, 1.5) in done.stdout


@pytest.mark.parametrize("size", [(30000, 20000), (16385, 16384)])
def test_a_picture_with_too_many_pixels_is_refused(house: House, pics: Path, size: tuple[int, int]) -> None:
    blank(pics / "scan.png", *size, whole=False)
    assert check(house, 2)[0] == (
        f"error: a.toml:5: data.source: pics/scan.png: not a readable image (expected at most 268,435,456 pixels "
        f"(16,384 x 16,384), got {size[0] * size[1]:,}); scale it down"
    )
    spec = house.folder / "a.toml"
    spec.write_text(spec.read_text().replace("center_crop", "buckets = true\ncenter_crop"))
    assert "expected at most 268,435,456 pixels " in check(house, 2)[0]


def test_the_largest_picture_that_is_read(pics: Path) -> None:
    path = blank(pics / "scan.png", 16384, 16384, whole=False)
    with sources.opener(path)() as opened:
        assert opened.size == (16384, 16384)


@pytest.mark.parametrize("ending", sorted(image_formats.FORMAT_BY_ENDING))
def test_every_ending_read_has_an_allowed_decoder(pics: Path, ending: str) -> None:
    path = drawn(pics / f"x{ending}", 3, format=image_formats.FORMAT_BY_ENDING[ending])
    assert path in scan_folder(pics).pictures
    assert images.decode(images.Picture("x", str(path), "a", sources.opener(path))).size == (96, 96)


def test_a_file_name_that_is_not_utf8_is_reported(house: House) -> None:
    """As a disk from another system has them, whose names are in another encoding."""
    odd = os.fsencode(house.folder / "pictures") + b"/gr\xfcn"
    for ending in (b".png", b".txt"):
        with open(odd + ending, "wb") as file:
            file.write(b"a TOK")
    said = house.fluxrun("check", house.spec())
    assert said.code == 0, said.out
    assert "1 file looks like a picture and is not used" in said.out
    assert "    gr?n.png: its name is not UTF-8; rename it\n" in said.out
