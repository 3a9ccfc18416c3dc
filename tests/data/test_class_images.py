"""Folders of class images that several runs share: each run gets images of its own prompt by its own base, or is
refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runner.base.files import BUILTIN, identity_of
from runner.core import locks
from runner.core.errors import FluxrunError
from runner.data import class_images
from runner.training.phases.prior import prior_phase
from tests.support.house import House
from tests.support.paths import PICTURES
from tests.support.runs import context_of

PRIOR = '[prior]\nimages = "{images}"\nprompt = "{prompt}"\ncount = {count}\n'


def spec(house: House, name: str, prompt: str, images: str = "classes", count: int = 2, **changes: str) -> Path:
    small = {"steps": "steps = 1", "prompts": "prompts = []", "batch_size": "batch_size = 1", **changes}
    path = house.spec(name, drop="[[tokens]]", **small)
    text = path.read_text().replace('[inversion]\nencoders = ["clip", "t5"]\nlr = 1e-2\n', "")
    path.write_text(text + PRIOR.format(images=images, prompt=prompt, count=count))
    return path


def own_pictures(house: House, count: int = 2) -> Path:
    folder = house.folder / "classes"
    folder.mkdir()
    for index in range(count):
        shutil.copy(PICTURES / f"0{index + 1}.png", folder / f"dog{index}.png")
    return folder


def noted(folder: Path, **note: str) -> None:
    """As an earlier run left it: one image made, and its note."""
    folder.mkdir(exist_ok=True)
    shutil.copy(PICTURES / "01.png", folder / "class-00000.png")
    (folder / "fluxrun-prior.json").write_text(json.dumps(note))


def faults(house: House, *specs: Path | str, command: str = "plan") -> list[str]:
    """Of a batch that is refused; the house's own path is left out of them."""
    said = house.fluxrun(command, *specs)
    assert said.code == 2
    *found, last = said.err.replace(f"{house.folder}/", "").splitlines()
    assert last.endswith("nothing was started")
    return found


# ---- specs of one batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "queue"])
def test_two_prompts_for_one_folder_are_refused(house: House, command: str) -> None:
    spec(house, "a", "a green circle")
    spec(house, "b", "a blue square")
    spec(house, "c", "a green circle")
    assert faults(house, "a.toml", "b.toml", "c.toml", command=command) == [
        "b.toml:21: prior.prompt: a.toml:21 has another prompt for the same folder of class images (found 'a blue square', "
        "there 'a green circle'); give this run its own prior.images, or the same prompt"
    ]
    assert not (house.folder / "classes").exists()
    assert not (house.folder / "runs").exists()


def test_check_refuses_two_prompts_for_one_folder(house: House) -> None:
    spec(house, "a", "a green circle")
    spec(house, "b", "a blue square")
    said = house.fluxrun("check", "a.toml", "b.toml")
    assert said.code == 2
    assert said.out.splitlines()[0].startswith(
        "error: b.toml:21: prior.prompt: a.toml:21 has another prompt for the same"
    )
    spec(house, "b", "a blue square", images="others")
    assert house.fluxrun("check", "a.toml", "b.toml").code == 0


def test_a_sweep_of_prompts_cannot_share_a_folder(house: House) -> None:
    path = spec(house, "a", "a circle")
    path.write_text(path.read_text() + '[sweep]\n"prior.prompt" = ["a circle", "a star"]\n"lora.rank" = [2, 4]\n')
    assert faults(house, path) == [
        "a.toml:24: prior.prompt: a.toml:24 has another prompt for the same folder of class images (found 'a star', there "
        "'a circle'); take it out of the sweep, and write a spec for each prompt, with its own prior.images"
    ]


def test_two_bases_for_one_folder_are_refused(house: House) -> None:
    """A copy of a base is the same base; one with another file is not."""
    spec(house, "a", "a circle")
    copy = house.folder / "base"
    shutil.copytree(BUILTIN["builtin:tiny"], copy, copy_function=os.link)
    spec(house, "b", "a circle", base='base = "base"')
    assert house.fluxrun("plan", "a.toml", "b.toml").code == 0
    config = copy / "scheduler" / "scheduler_config.json"
    text = config.read_text()
    config.unlink()  # it is a link to the bundled one
    config.write_text(text + "\n")
    assert faults(house, "a.toml", "b.toml") == [
        "b.toml:20: prior.images: a.toml:2 has another base for the same folder of class images (found base, there "
        "builtin:tiny); give this run its own prior.images, or the same base"
    ]
    spec(house, "a", "a circle", base='base = "some/model"')
    spec(house, "b", "a circle", base='base = "some/model"\nrevision = "v2"')
    [fault] = faults(house, "a.toml", "b.toml")
    assert "(found some/model at revision v2, there some/model at revision main)" in fault


def test_a_folder_that_the_user_filled_serves_every_prompt(house: House) -> None:
    folder = own_pictures(house)
    specs = spec(house, "a", "a dog"), spec(house, "b", "a photo of a dog")
    assert house.fluxrun("plan", *specs).code == 0
    for path in specs:  # one after the other, neither of which makes any
        prior_phase(context_of(path))
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "dog0.png", "dog1.png"]
    spec(house, "b", "a photo of a dog", count=3)  # this one makes one
    assert house.fluxrun("plan", *specs).code == 2


def test_class_images_of_another_run_are_not_training_images(house: House) -> None:
    (house.folder / "mine").mkdir()
    shutil.copy(PICTURES / "01.png", house.folder / "mine" / "1.png")
    spec(house, "a", "a circle", images="mine/classes")
    house.spec("b", source='source = "mine"\nprompt = "a TOK"')
    house.spec("c", source='source = "runs/a/samples"\nprompt = "a TOK"')
    (house.folder / "runs" / "a" / "samples").mkdir(parents=True)
    shutil.copy(PICTURES / "01.png", house.folder / "runs" / "a" / "samples")
    assert faults(house, "a.toml", "b.toml", "c.toml") == [
        "b.toml:5: data.source: it holds mine/classes, which run a fills with class images (a.toml:20), so "
        "they would be trained on; name a folder elsewhere there",
        "c.toml:5: data.source: it lies in the folder of run a, which is yet to be trained; "
        "queue this spec once that run is done",
    ]


# ---- notes of earlier nights ---------------------------------------------------------------------------------------


def test_a_note_of_another_base_is_refused(house: House) -> None:
    tiny = identity_of("builtin:tiny", None)
    path, folder = spec(house, "a", "a circle"), house.folder / "classes"
    noted(folder, prompt="a circle", base="me/other", revision="0123", fingerprint="of other files")
    assert faults(house, path) == [
        "a.toml:20: prior.images: classes holds images made by me/other at revision 0123, got builtin:tiny; "
        "use another folder, or the same base"
    ]
    noted(folder, prompt="a circle", base="/moved/since", fingerprint=str(tiny.fingerprint))
    assert house.fluxrun("plan", path).code == 0
    noted(folder, prompt="a circle", base="builtin:tiny", fingerprint="of other files")
    assert "made by builtin:tiny, whose files have changed since then" in house.fluxrun("plan", path).err


def test_old_notes_name_only_the_base(house: House) -> None:
    """Earlier versions wrote them, even into folders in which they had made nothing."""
    path, folder = spec(house, "a", "a circle"), house.folder / "classes"
    for base in ("builtin:tiny", "/gone/since", str(BUILTIN["builtin:tiny"])):
        noted(folder, prompt="a circle", base=base)
        assert house.fluxrun("plan", path).code == 0, base
    noted(folder, prompt="a circle", base="me/other")
    assert "made by me/other, got builtin:tiny" in house.fluxrun("plan", path).err
    (folder / "class-00000.png").rename(folder / "dog.png")
    assert house.fluxrun("plan", path).code == 0


# ---- while the batch runs ------------------------------------------------------------------------------------------


def test_a_run_that_finds_the_folder_filled_for_another_prompt_fails(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another queue, after this one has looked."""
    path, folder = spec(house, "a", "a circle"), house.folder / "classes"
    lock = locks.hold_lock

    @contextmanager
    def late(path: Path, **more: Any) -> Iterator[None]:
        if path.parent == folder:
            noted(folder, prompt="a star", base="builtin:tiny")
        with lock(path, **more):
            yield

    monkeypatch.setattr("runner.training.phases.prior.locks.hold_lock", late)
    said = house.fluxrun("queue", path)
    assert said.code == 1
    assert (
        f"a: failed: prior.prompt: {folder} holds images of the prompt 'a star', got 'a circle'; use another "
        "folder, or the same prompt" in said.err
    )
    assert sorted(one.name for one in folder.iterdir()) == [".lock", "class-00000.png", "fluxrun-prior.json"]


def test_a_folder_filled_for_another_prompt_is_left_unchanged(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.training.phases.prior.STEPS", 2)
    first, second = (context_of(spec(house, name, prompt)) for name, prompt in (("a", "a circle"), ("b", "a star")))
    prior_phase(first)
    note = json.loads((house.folder / "classes" / "fluxrun-prior.json").read_text())
    assert note == {
        "prompt": "a circle", "base": "builtin:tiny", "revision": None,
        "fingerprint": identity_of("builtin:tiny", None).fingerprint,
    }  # fmt: skip
    before = {path.name: path.read_bytes() for path in (house.folder / "classes").iterdir()}
    with pytest.raises(FluxrunError, match="of the prompt 'a circle', got 'a star'"):
        prior_phase(second)
    assert {path.name: path.read_bytes() for path in (house.folder / "classes").iterdir()} == before


def test_class_images_replaced_before_training_are_noticed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that is done no longer minds what becomes of the folder."""
    from runner.training import run as training_run
    from runner.training.phases.encode import encode_phase

    path, folder = spec(house, "a", "a dog"), own_pictures(house)

    def exchanged(*all_: Any) -> None:
        Image.new("RGB", (64, 64), "red").save(folder / "dog1.png")
        encode_phase(*all_)

    monkeypatch.setattr(training_run, "encode_phase", exchanged)
    said = house.fluxrun("queue", path)
    assert said.code == 1
    assert "a: failed: the class images: " in said.err
    monkeypatch.setattr(training_run, "encode_phase", encode_phase)
    shutil.copy(PICTURES / "02.png", folder / "dog1.png")
    assert house.fluxrun("queue", path).code == 0
    noted(folder, prompt="a cat", base="me/other")
    said = house.fluxrun("queue", path)
    assert (said.code, said.err.splitlines()[0]) == (
        0,
        "a: skipped, done (same spec, data and base; its exports are there)",
    )
    assert class_images.note_fault(folder, "a dog", identity_of("builtin:tiny", None)) is not None


def test_a_folder_where_class_images_cannot_be_generated(house: House) -> None:
    house.write("a-file", "")
    run = house.folder / "runs" / "old"
    run.mkdir(parents=True)
    for name in ("plan.json", "spec.toml"):
        (run / name).write_text("")
    cases = {
        "a-file": "expected a folder, got 'a-file', where a-file is a file; name a folder",
        "a-file/deep": "expected a folder, got 'a-file/deep', where a-file is a file; name a folder",
        "runs": "this is the runs folder runs; name another folder",
        "runs/old/samples": "this is, or is inside, the folder of a run (runs/old); name another folder",
    }
    for images, told in cases.items():
        said = house.fluxrun("plan", spec(house, "a", "a circle", images))
        assert said.code == 2, images
        assert f"prior.images: {told}\n" in said.err, said.err
