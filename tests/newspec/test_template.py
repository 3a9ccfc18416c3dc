"""The file that `fluxrun new` writes: every commented line is one that can be taken, and the options fill in what they
say."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runner.newspec.template import NEEDED
from runner.newspec.template_tables import INSTEAD, TEMPLATES
from runner.spec.keys import spec_keys
from runner.spec.loader import load
from runner.spec.schema import dump
from tests.support.house import House
from tests.support.paths import PICTURES

COMMENTED = re.compile(r'^# ((?:[a-z_0-9]+|"[a-z_.]+") = .*)$')
HEADING = re.compile(r"^(# )?\[+[a-z_.]+\]+$")


@pytest.fixture
def bare(tmp_path: Path) -> House:
    """A folder with what a template's examples name."""
    house = House.__new__(House)
    house.folder = tmp_path
    (tmp_path / "my-pictures").mkdir()
    (tmp_path / "my-pictures" / "a.png").write_bytes((PICTURES / "01.png").read_bytes())
    (tmp_path / "base.toml").write_text("[lora]\nrank = 8\n")
    return house


def new(house: House, *options: str, file: str = "a.toml") -> str:
    said = house.fluxrun("new", file, *options)
    assert said.code == 0, said.err
    return (house.folder / file).read_text()


def taken(text: str) -> Iterator[tuple[str, str]]:
    """(dotted key, the file) for each commented line, the # taken away from it alone, with its heading's and those of
    the lines that are needed with it."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not (match := COMMENTED.match(line)):
            continue
        own, table = {number}, ""
        start = next((at for at in range(number, -1, -1) if HEADING.match(lines[at])), None)
        if start is not None:
            table = lines[start].strip("# []") + "."
            if lines[start].startswith("# "):
                end = next((at for at in range(start, len(lines)) if not lines[at]), len(lines))
                own |= {start, *(at for at in range(start, end) if NEEDED in lines[at])}
        key = table + match[1].split(" = ")[0].strip('"')
        yield key, "\n".join(one[2:] if at in own else one for at, one in enumerate(lines)) + "\n"


def alternatives(text: str) -> Iterator[tuple[str, str]]:
    """(key, the file) for each line that tells what may stand in another's place, done."""
    for match in re.finditer(r"^([a-z]+) = .*\n# Instead of \1, .*?: (.*)$", text, re.M):
        shown = match[2].replace(", ", "\n")
        yield match[1], text.replace(match[0], shown)


def planned(house: House, texts: dict[str, str]) -> dict[str, Any]:
    folder = house.folder / "each"
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text.replace('"my-pictures"', '"../my-pictures"'))
    (folder / "base.toml").write_text((house.folder / "base.toml").read_text())
    document = json.loads(house.fluxrun("plan", *sorted(folder.glob("[0-9]*.toml")), "--json").out)
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_commented_line_can_be_uncommented(bare: House, template: str) -> None:
    text = new(bare, "--template", template)
    cases = [*taken(text), *alternatives(text)]
    assert len(cases) > 70
    assert len(list(alternatives(text))) == len(INSTEAD)
    found = planned(bare, {f"{number:03}-{key.rpartition('.')[2]}": one for number, (key, one) in enumerate(cases)})
    assert found["errors"] == []
    swept = sum(
        len(tomllib.loads(one)["sweep"][key.removeprefix("sweep.")]) - 1 for key, one in cases if "sweep." in key
    )
    assert len(found["runs"]) == len(cases) + swept


EXAMPLES = {  # lines that show no default, there being none
    "name", "extends", "model.revision", "model.variant", "model.dtype", "tokens.initializer", "tokens.placeholder",
    "inversion.gradient_checkpointing", "train.weighting", "checkpoint.minutes", "stop.no_better_for", "stop.loss_above",
    "stop.at", "hub.repo", "notify.url", "notify.command",
}  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_line_that_shows_a_default_changes_nothing(bare: House, template: str) -> None:
    text = new(bare, "--template", template)
    before = dump(load([bare.folder / "a.toml"])[0].spec)
    changing = set()
    for key, one in taken(text):
        tables = tomllib.loads(one)
        if (
            {"prior", "text_lora"} & tables.keys()
            or tables["sweep"]
            or tables.get("optimizer", {}).get("name") == "prodigy"
        ):
            continue
        (bare.folder / "b.toml").write_text(one)
        after = dump(load([bare.folder / "b.toml"])[0].spec)
        if after != {**before, "name": "b"}:
            changing.add(key)
    absent = () if template != "lora" else ("tokens.", "inversion.")
    assert changing == {key for key in EXAMPLES if not key.startswith(absent)}


def test_every_key_is_in_some_template(bare: House) -> None:
    there: set[str] = set()
    for template in TEMPLATES:
        text = new(bare, "--template", template, file=f"{template}.toml")
        assert max(len(line) for line in text.splitlines()) <= 120
        for _, one in [*taken(text), *alternatives(text), ("", text)]:
            there |= set(keys_of(tomllib.loads(one)))
    assert set(spec_keys()) <= there
    assert {"extends", "sweep.lora.rank", "sweep.seed"} <= there


def keys_of(tables: dict[str, Any], before: str = "") -> Iterator[str]:
    for key, value in tables.items():
        yield f"{before}{key}"
        for inner in value if isinstance(value, list) else [value]:
            yield from keys_of(inner, f"{before}{key}.") if isinstance(inner, dict) else ()


@pytest.mark.parametrize("template", TEMPLATES)
def test_short_has_about_a_dozen_keys(bare: House, template: str) -> None:
    """And means what the long file means."""
    text = new(bare, "--template", template, "--short")
    whole = new(bare, "--template", template, file="whole.toml")
    assert 11 <= sum("." in key for key in keys_of(tomllib.loads(text))) <= 14
    assert not [line for line in text.splitlines() if COMMENTED.match(line)]
    assert len(text) < len(whole) / 3
    assert bare.fluxrun("plan", "a.toml").code == 0
    own, other = (dump(load([bare.folder / name])[0].spec) for name in ("a.toml", "whole.toml"))
    assert own == {**other, "name": "a"}


def test_the_commands_at_the_top_are_quoted(bare: House) -> None:
    said = bare.fluxrun("new", "my specs/a b.toml", "--short")
    assert said.err == "my specs/a b.toml: `fluxrun plan 'my specs/a b.toml'` checks it\n"
    text = (bare.folder / "my specs" / "a b.toml").read_text()
    assert "# `fluxrun plan 'my specs/a b.toml'` checks it and shows what would happen, " in text
    assert tomllib.loads(text)["name"] == "a-b"  # since a run cannot be called as the file is
    shutil.copytree(bare.folder / "my-pictures", bare.folder / "my specs" / "my-pictures")
    assert bare.fluxrun("plan", "my specs/a b.toml").out.startswith("a-b  (my specs/a b.toml)  new: ")


# ---- --card --------------------------------------------------------------------------------------------------------


def fits(house: House, file: str = "a.toml") -> dict[str, Any]:
    document = json.loads(house.fluxrun("plan", file, "--json").out)
    assert document["errors"] == []
    found = document["runs"][0]["fits"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("template", "card"),
    [("pivotal", 8), ("pivotal", 16), ("pivotal", 24), ("pivotal", 40), ("lora", 12), ("lora", 24), ("inversion", 24)],
)
def test_settings_chosen_for_a_card_fit_it(bare: House, template: str, card: int) -> None:
    text = new(bare, "--template", template, "--card", str(card), "--short")
    assert card in fits(bare)["cards"]
    if card < 40:
        plain = new(bare, "--template", template, file="plain.toml")
        assert card not in fits(bare, "plain.toml")["cards"]
        assert "quantize = " in text
        assert "quantize" not in re.sub("^# .*", "", plain, flags=re.M)


def test_chosen_settings_are_reported(bare: House) -> None:
    said = bare.fluxrun("new", "a.toml", "--card", "24")
    assert said.err == (
        'a.toml: fits a card of 24.0 GiB with model.gradient_checkpointing = true, model.quantize = "int8"\n'
        "a.toml: `fluxrun plan a.toml` checks it\n"
    )
    text = (bare.folder / "a.toml").read_text()
    assert re.search(r'^quantize = "int8"  ', text, re.M)
    assert "# quantize" not in text
    said = bare.fluxrun("new", "b.toml", "--card", "80GB")
    assert said.err.startswith("b.toml: fits a card of 80.0 GiB as it is\n")


def smi(house: House, monkeypatch: pytest.MonkeyPatch, *mebibytes: int) -> None:
    """An nvidia-smi that tells of these cards."""
    lines = [f"{number}, GPU-{number}, Test Card, {size}, {size - 10}, 8.9" for number, size in enumerate(mebibytes)]
    tool = house.folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{line}'" for line in lines) + "\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{house.folder}:/usr/bin:/bin")


def test_auto_takes_the_smallest_gpu(bare: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several the smallest that may be used: a run can come to any of them."""
    smi(bare, monkeypatch, 81559, 24564, 16376)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    said = bare.fluxrun("new", "a.toml", "--card", "auto")
    assert said.err.startswith("a.toml: fits a card of 24.0 GiB with model.gradient_checkpointing = true, ")
    assert fits(bare)["needs_bytes"] < 24564 << 20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert bare.fluxrun("new", "b.toml", "--card", "auto").err.startswith("b.toml: fits a card of 79.6 GiB as it is\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--card", "auto"),
            "--card: nvidia-smi shows no GPU; write how much memory it has in GiB, e.g. --card 24",
        ),
        (("--card", "large"), "--card: expected a card's memory in GiB, or auto, got 'large'; e.g. --card 24"),
        (("--card", "0"), "--card: expected a card's memory in GiB, or auto, got '0'; e.g. --card 24"),
        (("--card", "nan"), "--card: expected a card's memory in GiB, or auto, got 'nan'; e.g. --card 24"),
        (
            ("--card", "2"),
            "--card: no setting fits black-forest-labs/FLUX.1-dev into 2.0 GiB; the lowest estimate is 2.8 GiB, with "
            'model.gradient_checkpointing = true, model.quantize = "nf4", model.offload = "blocks"',
        ),
        (
            ("--card", "24", "--from-command", "x_flux.py --dataset_name=y --pretrained_model_name_or_path=some/base"),
            "--card: the memory that some/base needs is not known before its configs are on this disk; leave --card out, and "
            "see `fluxrun plan` when they are",
        ),
    ],
)
def test_impossible_cards_are_refused(
    bare: House, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said = bare.fluxrun("new", "a.toml", *options)
    assert said.code == 2
    assert said.err.endswith(f"Error: Invalid value for {message}\n")
    assert not (bare.folder / "a.toml").exists()


COMMAND = (
    "x_flux.py --dataset_name=my-pictures --instance_prompt=icon --output_dir=/tmp/.my:run "
    "--pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev --resolution 1024 --train_batch_size 4"
)


@pytest.mark.parametrize("card", [12, 24, 80])
def test_a_command_line_for_a_card(bare: House, card: int) -> None:
    text = new(bare, "--from-command", f"{COMMAND} --max_train_steps 300", "--card", str(card))
    assert card in fits(bare)["cards"]
    tables = tomllib.loads(text)
    assert tables["name"] == "my-run"
    assert tables["train"]["batch_size"] * tables["train"]["accumulate"] == 4  # the same steps, in smaller parts


def test_a_command_that_fluxrun_would_refuse_writes_nothing(bare: House) -> None:
    said = bare.fluxrun("new", "a.toml", "--from-command", COMMAND.replace("1024", "1000"))
    assert said.code == 2
    assert "Invalid value for --from-command: fluxrun would refuse that spec: data.resolution: " in said.err
    assert not (bare.folder / "a.toml").exists()
    said = bare.fluxrun("new", "a.toml", "--from-command", f"{COMMAND} --with_prior_preservation")
    assert said.err.endswith("--with_prior_preservation needs a --class_prompt, as in the script; add it\n")
    text = new(bare, "--from-command", f"{COMMAND} --lr_scheduler cosine --max_train_steps 300")
    assert (
        "# --lr_warmup_steps: 500, the script's default, is longer than the run; schedule.warmup is its 300 steps.\n"
        in text
    )
    assert bare.fluxrun("plan", "a.toml").code == 0


@pytest.mark.parametrize("option", [("--template", "lora"), ("--short",), ("--pictures", "my-pictures")])
def test_from_command_excludes_the_template_options(bare: House, option: tuple[str, ...]) -> None:
    said = bare.fluxrun("new", "a.toml", "--from-command", COMMAND, *option)
    assert said.code == 2
    assert said.err.endswith(f"Error: --from-command does not go with {option[0]}: the command says what it trains\n")


# ---- --pictures ----------------------------------------------------------------------------------------------------


def pictures(folder: Path, *sizes: tuple[int, int], captions: tuple[str | None, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number * 20, 0, 0)).save(folder / f"{number}.png")
        if number < len(captions) and captions[number] is not None:
            (folder / f"{number}.txt").write_text(str(captions[number]))
    return folder


def data_of(house: House, *options: str, file: str = "specs/a.toml") -> dict[str, Any]:
    """What the spec says; `plan` takes it as it is."""
    said = house.fluxrun("new", file, *options)
    assert said.code == 0, said.err
    planned = house.fluxrun("plan", file)
    assert (planned.code, planned.err) == (0, "")
    return tomllib.loads((house.folder / file).read_text())


def test_pictures_without_captions(bare: House) -> None:
    pictures(bare.folder / "dogs", (800, 800), (900, 900))
    tables = data_of(bare, "--pictures", "dogs")
    assert tables["data"] == {"source": "../dogs", "prompt": "a photo of TOK", "resolution": 768}
    assert tables["tokens"] == [{"name": "TOK"}]


def test_captions_make_the_prompt_needless_and_name_the_token(bare: House) -> None:
    pictures(bare.folder / "dogs", (700, 520), (520, 700), captions=("a photo of ANNA", "ANNA, in Rome"))
    tables = data_of(bare, "--pictures", "dogs", file="a.toml")
    assert tables["data"] == {"source": "dogs", "resolution": 512, "buckets": True}
    assert tables["tokens"] == [{"name": "ANNA"}]
    assert tables["validate"]["prompts"] == ["a photo of ANNA"]
    tables = data_of(bare, "--pictures", "dogs", "--template", "lora", "--short", "--card", "12", file="b.toml")
    assert tables["data"] == {"source": "dogs", "resolution": 512, "buckets": True}
    assert tables["model"]["quantize"] == "nf4"
    assert "tokens" not in tables


def test_pictures_of_which_only_some_have_captions(bare: House) -> None:
    pictures(bare.folder / "dogs", (2000, 2000), (1500, 1500), captions=("a photo of BOB", None))
    said = bare.fluxrun("new", "a.toml", "--pictures", "dogs")
    assert said.err.startswith("a.toml: 2 pictures, 1 with a caption of their own\n")
    tables = tomllib.loads((bare.folder / "a.toml").read_text())
    assert tables["data"] == {"source": "dogs", "prompt": "a photo of BOB", "resolution": 1024}
    assert bare.fluxrun("plan", "a.toml").code == 0


def test_captions_in_metadata(bare: House) -> None:
    folder = pictures(bare.folder / "icons", (100, 100))
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "a 3d icon of TOK"}\n')
    tables = data_of(bare, "--pictures", "icons", file="a.toml")
    assert tables["data"] == {"source": "icons", "caption_column": "prompt", "resolution": 96}


def test_unused_files_are_counted(bare: House) -> None:
    folder = pictures(bare.folder / "dogs", (600, 600))
    (folder / "b.psd").write_text("x")
    said = bare.fluxrun("new", "a.toml", "--pictures", "dogs")
    told = "1 picture, 0 with a caption of their own; 1 file is not used, `fluxrun check a.toml` says why"
    assert said.err.startswith(f"a.toml: {told}\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": 7}\n')
    said = bare.fluxrun("new", "b.toml", "--pictures", "dogs")
    assert said.code == 2
    assert "Invalid value for --pictures: dogs/metadata.jsonl:1: text is " in said.err


def test_a_few_small_pictures_do_not_lower_the_resolution(bare: House) -> None:
    pictures(bare.folder / "dogs", *[(1100, 1100)] * 11, (300, 300))
    assert data_of(bare, "--pictures", "dogs")["data"]["resolution"] == 1024


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "no image in dogs; expected files that end in "),
        (
            lambda folder: pictures(folder, (64, 64), (64, 64), captions=("a dog", "A dog")),
            "all 2 pictures have a caption, and no word in capitals, like TOK, is in each; write the word to be learned into "
            "them, or take --template lora",
        ),
        (
            lambda folder: pictures(folder, (64, 64), (64, 64), captions=("a TOK in 4K HD", "HD, TOK and BOB in 4K")),
            "all 2 pictures have a caption, and several words in capitals are in each (TOK, HD); write all but the one to be "
            "learned in small letters, or leave --pictures out and set tokens.name and data.source in the file",
        ),
        (
            lambda folder: pictures(folder, (64, 64), (64, 64), captions=("ohwx in HD", "HD ohwx")),
            "all 2 pictures have a caption, and several words in capitals, or like ohwx, are in each (ohwx, HD); ",
        ),
        (lambda folder: (folder.mkdir(), (folder / "a.png").write_text("x")), "dogs/a.png: not a readable image ("),
    ],
)
def test_unusable_picture_folders_are_refused(bare: House, make: Any, message: str) -> None:
    make(bare.folder / "dogs")
    said = bare.fluxrun("new", "a.toml", "--pictures", "dogs")
    assert said.code == 2
    assert f"Error: Invalid value for --pictures: {message}" in said.err
    assert not (bare.folder / "a.toml").exists()
    assert bare.fluxrun("new", "a.toml", "--pictures", "nothere").code == 2
