"""`fluxrun check`: set-ups that are broken on purpose, each found before anything trains, in which words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.base.files import BUILTIN
from runner.core import hardware
from runner.jobs.job import Job
from runner.preflight import base_files, libraries
from runner.runs.claim import claim_run
from tests.support.checks import report
from tests.support.house import House
from tests.support.hub import hub
from tests.support.paths import PICTURES, PROJECT
from tests.support.setups import Patch, Setup, appended, gpu, text

pytestmark = pytest.mark.usefixtures("bare_machine")
SAID = Path(__file__).parent / "broken_setups.txt"
PUSH = '[hub]\npush = true\nrepo = "me/creature"\n'
WANDB = '[track]\nto = ["wandb"]\n'
PRIOR = '[prior]\nimages = "classes"\nprompt = "a red circle"\ncount = 1\n'


# ---- ways to break things ------------------------------------------------------------------------------------------


def spec(**changes: str) -> Setup:
    return lambda house, _: house.spec(**changes)


def instead(content: str) -> Setup:
    return lambda house, _: house.write("a.toml", content)


def base(change: Callable[[Path], object]) -> Setup:
    """A copy of the bundled base, changed."""

    def setup(house: House, _: Patch) -> Path:
        folder = house.folder / "base"
        shutil.copytree(BUILTIN["builtin:tiny"], folder, copy_function=os.link)
        change(folder)
        return house.spec(base='base = "base"')

    return setup


def rewritten(path: Path, content: str | bytes) -> None:
    path.unlink()  # it is a link to the bundled one
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def edited(path: Path, **keys: object) -> None:
    rewritten(path, json.dumps({**json.loads(path.read_text()), **keys}))


def sharded(folder: Path) -> None:
    whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    names = base_files.read_header(whole)
    whole.rename(whole.with_name("one-00001-of-00002.safetensors"))
    index = {name: f"one-0000{1 + (name == 'proj_out.weight')}-of-00002.safetensors" for name in names}
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps({"weight_map": index}))


def shortened(path: Path) -> None:
    rewritten(path, path.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")


def truncated(house: House, _: Patch) -> Path:
    whole = (PICTURES / "03.png").read_bytes()
    (house.folder / "pictures" / "03.png").write_bytes(whole[: len(whole) // 2])
    return house.spec()


def two_unreadable(house: House, _: Patch) -> Path:
    for name in ("03.png", "07.png"):
        (house.folder / "pictures" / name).write_bytes(b"no picture")
    return house.spec()


def held_out_copy(house: House, _: Patch) -> Path:
    path = house.spec(source='source = "pictures"\nholdout = 1')
    from runner.jobs.prepare import prepare_jobs

    [job] = prepare_jobs([path], house.folder / "runs", fetch=False, fresh=False)
    assert job.pictures is not None
    [held] = job.pictures.held_out
    shutil.copy(held.location, house.folder / "pictures" / "copy.png")
    (house.folder / "pictures" / "copy.txt").write_text("a TOK")
    return path


def behind_the_end(house: House, _: Patch) -> Path:
    (house.folder / "pictures" / "01.txt").write_text("a red circle on a white background in the middle " * 8 + "TOK")
    return house.spec(encoders='encoders = ["clip"]')


def bad_class(house: House, _: Patch) -> Path:
    (house.folder / "classes").mkdir()
    (house.folder / "classes" / "0.png").write_bytes(b"no picture")
    return appended(PRIOR)(house, _)


def other_class(house: House, patch: Patch) -> Path:
    path = bad_class(house, patch)
    shutil.copy(PICTURES / "01.png", house.folder / "classes" / "0.png")
    house.write("classes/fluxrun-prior.json", '{"prompt": "a dog"}')
    return path


def another_run(house: House, _: Patch) -> Path:
    path = house.spec(rank="rank = 8")
    from runner.jobs.prepare import prepare_jobs

    [job] = prepare_jobs([path], house.folder / "runs", fetch=False, fresh=False)
    claim_run(job.run, job.spec, job.plan, "0.1.0", job.source.origin)
    job.run.release()
    return house.spec()


def full_disk(house: House, patch: Patch) -> Path:
    usage = type(shutil.disk_usage(house.folder))
    patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 2**19))
    return house.spec()


def little_memory(house: House, patch: Patch) -> Path:
    patch.setattr(
        hardware, "MEMINFO", house.write("meminfo", "MemTotal: 9 kB\nMemAvailable: 4096 kB\nSwapFree: 4 kB\n")
    )
    patch.setattr(hardware, "_container_memory", lambda: None)
    return house.spec()


def without(package: str, more: str, **changes: str) -> Setup:
    def setup(house: House, patch: Patch) -> Path:
        patch.setattr(libraries, "find_spec", lambda name: None if name == package else find_spec(name))
        patch.setenv("WANDB_MODE", "offline")
        return appended(more, **changes)(house, patch)

    return setup


def then(change: Callable[[Path], object], **changes: str) -> Setup:
    """Something done to the folder, then the spec."""

    def setup(house: House, _: Patch) -> Path:
        change(house.folder)
        return house.spec(**changes)

    return setup


def two_of_a_name(house: House, _: Patch) -> Path:
    (house.folder / "specs").mkdir()
    for stem in ("a", "b"):
        path = house.spec()
        path.rename(house.folder / "specs" / f"{stem}.toml")
    for path in (house.folder / "specs").glob("*.toml"):
        path.write_text(f'name = "same"\n{path.read_text()}'.replace('"pictures"', '"../pictures"'))
    return house.folder / "specs"


BROKEN: dict[str, Setup] = {
    # ---- the spec
    "unknown key": spec(rank="rnk = 4"),
    "wrong type": spec(steps='steps = "6"'),
    "no base": spec(base='variant = "fp16"'),
    "not TOML": instead("[model\n"),
    "extends nothing": instead('extends = "none.toml"\n'),
    "a circle of files": instead('extends = "a.toml"\n'),
    "a sweep of no list": appended('[sweep]\n"lora.rank" = 4\n'),
    "two runs of one name": two_of_a_name,
    "no such layer": spec(rank='rank = 4\nlayers = ["attn.to_z"]'),
    "a secret": appended('[hub]\ntoken = "hf_secret"\n'),
    "another run's folder": another_run,
    # ---- the data
    "a truncated picture": truncated,
    "two files that are no pictures": two_unreadable,
    "no such folder": spec(source='source = "./pictuers"'),
    "no picture in it": then(lambda folder: (folder / "empty").mkdir(), source='source = "empty"'),
    "no caption": then(lambda folder: (folder / "pictures" / "02.txt").unlink()),
    "a caption that is not UTF-8": then(lambda folder: (folder / "pictures" / "02.txt").write_bytes(b"a TOK \xff")),
    "no caption names the token": spec(name='name = "SKS"'),
    "all pictures held out": spec(source='source = "pictures"\nholdout = 10'),
    "a held-out picture that is trained on": held_out_copy,
    "a token behind what CLIP reads": behind_the_end,
    "a table that names no file": text("pictures/metadata.jsonl", '{"file_name": "none.png", "text": "a TOK"}\n'),
    "a table that is no JSON": text("pictures/metadata.jsonl", "{'file_name': 1}\n"),
    "no such column": then(
        lambda folder: (folder / "pictures" / "metadata.jsonl").write_text('{"file_name": "01.png", "text": "a TOK"}'),
        source='source = "pictures"\ncaption_column = "txt"',
    ),
    "a class image that is none": bad_class,
    "class images of another prompt": other_class,
    # ---- the base
    "no such base": spec(base='base = "builtin:tyni"'),
    "no model in the folder": base(lambda folder: (folder / "model_index.json").unlink()),
    "another kind of model": base(
        lambda folder: edited(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    ),
    "a config that is no JSON": base(lambda folder: rewritten(folder / "transformer" / "config.json", "{")),
    "a config of another model": base(lambda folder: rewritten(folder / "text_encoder" / "config.json", "{}")),
    "a missing shard": base(sharded),
    "a file cut short": base(lambda folder: shortened(folder / "text_encoder_2" / "model.safetensors")),
    "an LFS pointer": base(
        lambda folder: rewritten(
            folder / "vae" / "diffusion_pytorch_model.safetensors", "version https://git-lfs.github.com/spec/v1\n"
        )
    ),
    "pickles": base(pickled),
    "no weights": base(lambda folder: (folder / "text_encoder" / "model.safetensors").unlink()),
    "a variant that is not there": then(
        lambda folder: shutil.copytree(BUILTIN["builtin:tiny"], folder / "base"), base='base = "base"\nvariant = "fp16"'
    ),
    "weights of another config": base(lambda folder: edited(folder / "transformer" / "config.json", num_layers=9)),
    "no tokenizer": base(lambda folder: (folder / "tokenizer_2" / "tokenizer.json").unlink()),
    "no scheduler": base(lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink()),
    "a hub base without a net": spec(base='base = "some/model"'),
    # ---- the machine
    "a full disk": full_disk,
    "little memory": little_memory,
    "a GPU that is full": gpu("0, GPU-a, Test Card, 24000, 3, 8.6"),
    "more GPUs than there are": gpu("0, GPU-a, Test Card, 24000, 23000, 8.6", more="[compute]\ngpus = 2\n"),
    "no bitsandbytes": without("bitsandbytes", '[optimizer]\nname = "adamw8bit"\n'),
    "no bitsandbytes for nf4": without("bitsandbytes", "", base='base = "builtin:tiny"\nquantize = "nf4"'),
    "no flash attention": without("flash_attn", "", base='base = "builtin:tiny"\nattention = "flash"'),
    "attention of a GPU": spec(base='base = "builtin:tiny"\nattention = "_native_cudnn"'),
    "no wandb": without("wandb", WANDB),
    # ---- logins
    "W&B without a login": appended(WANDB),
}

# (what to break, refusals of the hub's answers, the token's role, the token)
ON_THE_HUB: dict[str, tuple[Setup, dict[str, tuple[int, str]], str, str]] = {
    "a gated base, no login": (
        spec(base='base = "some/model"'), {"/auth-check": (401, "GatedRepo")}, "write", "",
    ),
    "a gated base": (spec(base='base = "some/model"'), {"/auth-check": (403, "GatedRepo")}, "write", "hf_x"),
    "no such model": (spec(base='base = "some/model"'), {"/auth-check": (404, "RepoNotFound")}, "write", "hf_x"),
    "no such revision": (
        spec(base='base = "some/model"\nrevision = "old"'), {"/revision/old": (404, "RevisionNotFound")}, "write", "hf_x",
    ),
    "a push without a login": (appended(PUSH), {}, "write", ""),
    "a login that is refused": (appended(PUSH), {"/whoami-v2": (401, "")}, "write", "hf_x"),
    "a login that may only read": (appended(PUSH), {}, "read", "hf_x"),
    "a push to others": (appended(PUSH.replace("me/", "them/")), {}, "write", "hf_x"),
}  # fmt: skip


def expected() -> dict[str, list[str]]:
    """broken_setups.txt: a line `# NAME`, then the errors."""
    found: dict[str, list[str]] = {}
    for line in SAID.read_text().splitlines():
        if line.startswith("# "):
            errors = found.setdefault(line[2:], [])
        elif line.startswith("    "):
            errors[-1] += f"\n{line[4:]}"
        elif line:
            errors.append(line)
    return found


def test_every_broken_setup_has_its_words() -> None:
    assert expected().keys() == BROKEN.keys() | ON_THE_HUB.keys()
    assert all(expected().values())
    assert len(expected()) >= 30


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_setup_is_found_before_anything_trains(house: House, monkeypatch: Patch, name: str) -> None:
    path = BROKEN[name](house, monkeypatch)
    before = sorted(house.folder.rglob("*"))
    code, found = report(house, path)
    assert found["error"] == expected()[name]
    assert code == 2
    assert sorted(house.folder.rglob("*")) == before


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_what_only_the_hub_can_tell(house: House, monkeypatch: Patch, name: str) -> None:
    setup, refusals, role, token = ON_THE_HUB[name]
    path = setup(house, monkeypatch)
    with hub("someone") as there:
        there.refusals, there.role = refusals, role
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", there.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        code, found = report(house, path)
    assert [error.replace(there.address, "https://hub") for error in found["error"]] == expected()[name]
    assert code == 2
    assert not (house.folder / "runs").exists()


# ---- what is likely not meant --------------------------------------------------------------------------------------


def drawn(house: House, name: str, size: tuple[int, int], seed: int, caption: str = "a TOK") -> Path:
    """A picture of its own colours."""
    path = house.folder / "pictures" / name
    blocks = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path)
    path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture
def own_pictures(house: House) -> House:
    """Eight large pictures that nothing is wrong with."""
    shutil.rmtree(house.folder / "pictures")
    (house.folder / "pictures").mkdir()
    for index in range(8):
        drawn(house, f"{index}.png", (96, 96), index)
    return house


def warnings(house: House, path: Path) -> list[str]:
    code, found = report(house, path)
    assert (code, found["error"]) == (0, [])
    return found["warning"]


def test_nothing_is_said_of_what_is_well(own_pictures: House) -> None:
    assert warnings(own_pictures, own_pictures.spec()) == []
    _, found = report(own_pictures, "a.toml")
    assert found["note"][0] == "a.toml:5: data.source: training pictures: 8 at 64x64; 6 steps show each 1.5 times"
    assert [note.split(":")[0] for note in found["note"][1:]] == ["disk", "versions"]


def test_copies_are_found_by_what_they_show(own_pictures: House) -> None:
    pictures = own_pictures.folder / "pictures"
    shutil.copy(pictures / "0.png", pictures / "again.png")
    with Image.open(pictures / "1.png") as image:
        image.resize((120, 120), Image.Resampling.BICUBIC).save(pictures / "smaller.jpg", quality=80)
    for name in ("again", "smaller"):
        (pictures / f"{name}.txt").write_text("a TOK")
    assert warnings(own_pictures, own_pictures.spec()) == [
        "a.toml:5: data.source: 2 pictures found more than once, so training shows them more often; keep one copy of each "
        "in the data, or ignore this if intended\n0.png and again.png\n1.png and smaller.jpg (nearly)"
    ]


def test_a_held_out_picture_that_is_nearly_trained_on(own_pictures: House) -> None:
    path = own_pictures.spec(source='source = "pictures"\nholdout = 1')
    from runner.jobs.prepare import prepare_jobs

    [job] = prepare_jobs([path], own_pictures.folder / "runs", fetch=False, fresh=False)
    assert job.pictures is not None
    [held] = job.pictures.held_out
    with Image.open(held.location) as image:
        image.resize((120, 120)).save(own_pictures.folder / "pictures" / "near.png")
    (own_pictures.folder / "pictures" / "near.txt").write_text("a TOK")
    assert warnings(own_pictures, path) == [
        "a.toml:6: data.holdout: 1 held-out picture has a near copy in the training data, so the eval loss would be too low; "
        f"keep one copy of each in the data\nnear.png and {held.name} (nearly)"
    ]


def test_pictures_that_are_too_small_or_of_another_shape(own_pictures: House) -> None:
    drawn(own_pictures, "small.png", (60, 48), 50)
    drawn(own_pictures, "long.png", (640, 64), 51)
    assert warnings(own_pictures, own_pictures.spec()) == [
        "a.toml:6: data.resolution: 1 picture smaller than trained at, so enlarged and blurred (found 64); lower "
        "data.resolution, or take larger pictures\nsmall.png is 60x48, trained at 64x64: enlarged 1.3 times",
        "a.toml:6: data.resolution: 1 picture of which a crop shows less than half; data.buckets = true trains each in "
        "its shape\nlong.png is 640x64: a crop to 64x64 shows 10% of it",
    ]


def test_captions_cut_off_are_shown(own_pictures: House) -> None:
    (own_pictures.folder / "pictures" / "3.txt").write_text("a TOK " + "red " * 80 + "heart")
    said = warnings(own_pictures, own_pictures.spec())
    assert said == [
        "a.toml:5: data.source: 1 caption longer than the 77 tokens that CLIP reads; shorten them, or accept that "
        "the rest is cut off\n3.png has 86; cut off: 'red red red red red red red red heart'",
        "a.toml:3: model.max_sequence_length: 1 caption longer than the 32 tokens that T5 reads; shorten them, or raise "
        "model.max_sequence_length (up to 512), or accept that the rest is cut off\n3.png has 85; cut off: "
        f"'{'red ' * 24}r...'",
    ]


def test_what_is_told_of_captions(own_pictures: House) -> None:
    pictures = own_pictures.folder / "pictures"
    (pictures / "0.txt").write_text(" \n")
    (pictures / "1.txt").write_text("a tok on a hill")
    (pictures / "2.txt").unlink()
    (pictures / "9.txt").write_text("a TOK")
    path = own_pictures.spec(source='source = "pictures"\nprompt = "a TOK"', prompts='prompts = ["a hill"]')
    assert warnings(own_pictures, path) == [
        "a.toml:5: data.source: 1 caption file empty (0.txt), so data.prompt is read instead; write the captions, or "
        "delete the files",
        "a.toml:5: data.source: 1 caption file without a picture beside it (9.txt); a picture's caption is NAME.txt beside "
        "NAME.png",
        "a.toml:10: tokens.0.name: 1 of 8 captions without 'TOK' (1 in other letter case, which does not count); "
        "they teach it nothing, write it into them\n1.png: 'a tok on a hill'",
        "a.toml:23: validate.prompts: no prompt names a token that is learned (TOK), so the pictures would not show it; "
        "write it into one",
    ]
    _, found = report(own_pictures, path)
    assert (
        "a.toml:6: data.prompt: 2 of 8 pictures have no caption of their own and read data.prompt (0.png, 2.png)"
        in found["note"]
    )


def test_a_token_that_no_caption_names_is_told_once(house: House) -> None:
    _, found = report(house, house.spec(name='name = "SKS"'))
    assert [one for level in found.values() for one in level if "'SKS'" in one] == found["error"]


def test_other_things_that_are_likely_not_meant(own_pictures: House, monkeypatch: Patch) -> None:
    (own_pictures.folder / "classes").mkdir()
    more = '[prior]\nimages = "classes"\nprompt = "a TOK"\n'
    setup = gpu(
        "0, GPU-b, Old Card, 24000, 23000, 7.5", more=more, steps="steps = 3", max_sequence_length='dtype = "bf16"'
    )
    said = warnings(own_pictures, setup(own_pictures, monkeypatch))
    assert said == [
        "a.toml:16: train.steps: training pictures: 8 at 64x64; 3 steps show each 0.75 times: some are never seen; raise "
        "train.steps",
        "a.toml:26: prior.prompt: the class prompt names the token TOK (found 'a TOK'), which then learns the whole class; "
        "describe the class without it",
        "a.toml:3: model.dtype: GPU 0 (Old Card) has no bf16 of its own, so it is slow (bf16 comes with compute "
        "capability 8.0, this is 7.5)",
    ]


def test_a_base_that_must_be_fetched_is_told_with_its_size(house: House, monkeypatch: Patch) -> None:
    path = house.spec(base='base = "some/model"')
    with hub("someone") as there:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", there.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(house.folder / "hub"))
        code, found = report(house, path)
        assert code == 0
        assert found["note"][0] == "a.toml:2: model.base: some/model is not on this disk: 3.0 GiB are fetched first"
        usage = type(shutil.disk_usage(house.folder))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 10**10, 2 * 10**9))
        _, found = report(house, path)
    assert found["error"][0].startswith("disk: the runs need about 3.3 GiB (")
    assert (
        ", 3.0 GiB for the base's files, 16 MiB that must stay free), and runs has room for 1.9 GiB;"
        in found["error"][0]
    )


# ---- as a command --------------------------------------------------------------------------------------------------


def test_the_report_as_json(house: House, monkeypatch: Patch) -> None:
    two_unreadable(house, monkeypatch)
    said = house.fluxrun("check", "a.toml", "--json")
    assert said.code == 2
    document = json.loads(said.out)
    assert document["runs"] == ["a"]
    assert document["counts"]["error"] == 1
    first = document["findings"][0]
    assert (first["level"], first["line"], first["key"]) == ("error", 5, "data.source")
    assert first["message"] == "2 images cannot be read"
    assert [one.split(":")[0] for one in first["more"]] == ["pictures/03.png", "pictures/07.png"]


def test_a_sweep_and_its_neighbours_tell_a_fault_once(house: House, monkeypatch: Patch) -> None:
    path = truncated(house, monkeypatch)
    path.write_text(path.read_text() + '[sweep]\n"lora.rank" = [2, 4, 8]\n')
    said = house.fluxrun("check", path)
    assert said.out.count("not a readable image") == 1
    assert said.out.splitlines()[-1].startswith("3 runs: 1 error, ")


def test_a_queue_checks_first(house: House, monkeypatch: Patch) -> None:
    path = two_unreadable(house, monkeypatch)
    said = house.fluxrun("queue", path)
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert said.err.splitlines()[-1] == "1 error; nothing was started (--no-check starts anyway)"
    assert not (house.folder / "runs").exists()


def test_a_check_of_the_quickstart_is_quick_and_light(house: House) -> None:
    """Decoding, tokenizers and headers, in well under a second, without the heavy libraries."""
    code = (
        "import sys, time\nfrom click.testing import CliRunner\nfrom runner.cli import main\n"
        "began = time.process_time()\nresult = CliRunner().invoke(main, ['check', sys.argv[1]])\n"
        "assert result.exit_code == 0, result.output\nassert time.process_time() - began < 1, 'slow'\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'datasets', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(PROJECT / "specs" / "quickstart.toml")]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=house.folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.slow
def test_one_step_of_each_shape(own_pictures: House) -> None:
    drawn(own_pictures, "wide.png", (160, 90), 20)
    path = own_pictures.spec(center_crop="center_crop = true\nbuckets = true", prompts="prompts = []")
    code, found = report(own_pictures, path, "--step", "--gpus", "cpu")
    assert (code, found["error"]) == (0, [])
    steps = [note for note in found["note"] if "a step of" in note]
    assert [note.split(" takes ")[0] for note in steps] == [
        "a.toml:6: data.resolution: a step of 64x64 x 2",
        "a.toml:6: data.resolution: a step of 80x48 x 2",
    ]
    assert not (own_pictures.folder / "runs").exists()


def test_what_a_step_is_tried_with_and_told(own_pictures: House, monkeypatch: Patch) -> None:
    """Each shape once, whatever only changes how often or at what rate; what failed is an error."""
    tried = []

    def train(jobs: list[Job], runs: Path, *_: object, **__: object) -> int:
        for number, job in enumerate(jobs):
            assert job.run.folder.parent == runs
            assert job.pictures is not None
            tried.append((job.plan.sizes, len(job.pictures.items), job.spec.validation.prompts, job.spec.hub.push))
            state = {"state": "done", "s_per_step": 0.5, "peak_memory_bytes": 3 << 30}
            job.run.folder.mkdir()
            job.run.state_file.write_text(
                json.dumps(state if number else {"state": "failed", "error": "out of memory"})
            )
        return 0

    monkeypatch.setattr("runner.preflight.trial.run_queue", train)
    drawn(own_pictures, "wide.png", (160, 90), 20)
    path = own_pictures.spec(center_crop="center_crop = true\nbuckets = true")
    path.write_text(path.read_text() + '[sweep]\n"train.lr" = [1e-3, 1e-4]\n')
    code, found = report(own_pictures, path, "--step", "--gpus", "cpu")
    assert code == 2
    assert tried == [
        ({(64, 64): 2}, 2, ("a TOK on a white background",), False),
        ({(80, 48): 1}, 1, ("a TOK on a white background",), False),
    ]
    assert found["error"] == [
        "a.toml:6: data.resolution: the first steps of 64x64 x 2 failed (out of memory); see model and train for what "
        "needs less memory"
    ]
    assert found["note"][-1] == (
        "a.toml:6: data.resolution: a step of 80x48 x 2 takes 0.5 s, its peak is 3.0 GiB; 6 such steps take 0:03"
    )


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def test_captions_are_counted_as_the_encoders_read_them(tmp_path: Path) -> None:
    """CLIP's vocabulary and merges alone, as FLUX.1-dev has them, and both tokenizer.json, against transformers'
    own."""
    from transformers import AutoTokenizer

    from runner.preflight.tokenizers import FOLDERS, CaptionReader

    tiny = BUILTIN["builtin:tiny"]
    model = json.loads((tiny / "tokenizer" / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    captions = ["a <s0><s1> on a white background, don't!", "Ünder  THE très red-heart #12", "x" * 200, ""]
    pieces = ["<s0>", "<s1>"]
    for folder, encoder in ((tiny, "clip"), (tiny, "t5"), (tmp_path, "clip")):
        theirs = AutoTokenizer.from_pretrained(tiny, subfolder=FOLDERS[encoder])
        theirs.add_tokens(pieces)
        ours = CaptionReader(folder, encoder)
        for caption in captions:
            read = ours.read(caption, pieces, 20)
            ids = theirs(caption).input_ids
            assert read.count == len(ids), (encoder, caption)
            assert bool(read.unread) == (len(ids) > 20)
            if read.unread:
                kept = caption[: len(caption) - len(read.unread)]
                assert len(theirs(kept).input_ids) <= 20
