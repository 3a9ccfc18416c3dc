"""Why a run folder is not this spec's, told so that it can be put right: files by name, keys with their values."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runner.base.files import BUILTIN, file_digests, fingerprint
from runner.jobs.prepare import prepare_jobs
from runner.plan.build import make_plan
from runner.runs.claim import claim_run
from runner.runs.resume_advice import resume_advice
from tests.support.house import House

WAYS_OUT = "give this spec another `name`, undo the change, or queue it with --fresh, which moves the old folder aside"


@pytest.fixture
def copied(done: House, tmp_path: Path) -> House:
    """The finished run, to be changed."""
    house = House.__new__(House)
    house.folder = tmp_path
    shutil.copytree(done.folder, tmp_path, dirs_exist_ok=True)
    spec = tmp_path / "runs" / "a" / "spec.toml"  # as if it had been trained here
    spec.write_text(spec.read_text().replace(str(done.folder), str(tmp_path)))
    return house


def refusal(house: House, spec: Path) -> str:
    said = house.fluxrun("plan", spec)
    assert said.code == 2, said.out
    head, tail = f"{house.folder}/a.toml:1: name: runs/a holds another run: ", f"; {WAYS_OUT}"
    [line, _] = said.err.splitlines()
    assert line.startswith(head)
    assert line.endswith(tail)
    return line.removeprefix(head).removesuffix(tail)


def goes_on(house: House, spec: Path) -> str:
    said = house.fluxrun("plan", spec)
    assert said.code == 0, said.err
    return said.out.splitlines()[0].partition(".toml)  ")[2]


# ---- files ---------------------------------------------------------------------------------------------------------


def test_pictures_and_captions_that_are_others_are_named(copied: House) -> None:
    pictures = copied.folder / "pictures"
    (pictures / "01.txt").write_text("another TOK")
    (pictures / "02.png").write_bytes((pictures / "03.png").read_bytes())
    (pictures / "04.png").unlink()
    shutil.copy(pictures / "05.png", pictures / "new.png")
    (pictures / "new.txt").write_text("a TOK")
    assert refusal(copied, copied.folder / "a.toml") == (
        "pictures added: new.png; pictures removed: 04.png; pictures changed: 02.png; captions changed: 01.png ('a TOK on a "
        "white background in the middle' -> 'another TOK')"
    )
    assert refusal(copied, copied.spec(rank="rank = 8")).startswith("lora.rank: 4 -> 8; pictures added: new.png; ")


def test_the_bases_file_is_named_old_and_new(copied: House) -> None:
    folder = copied.folder / "base"
    shutil.copytree(BUILTIN["builtin:tiny"], folder)
    spec = copied.spec(base='base = "base"')
    assert goes_on(copied, spec).startswith("done: "), "a copy of the same base is the same base"
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert refusal(copied, spec) == (
        f"files of the base changed: vae/diffusion_pytorch_model.safetensors; model.base: builtin:tiny -> {folder}"
    )


def test_a_moved_folder_with_the_same_pictures_is_the_same_run(copied: House) -> None:
    (copied.folder / "pictures").rename(copied.folder / "images")
    spec = copied.spec(source='source = "images"')
    assert goes_on(copied, spec).startswith("done: ")
    (copied.folder / "images" / "01.png").unlink()
    assert refusal(copied, spec) == (
        f"pictures removed: 01.png; data.source: {copied.folder}/pictures -> {copied.folder}/images"
    )


def test_a_folder_of_an_earlier_fluxrun_is_refused_as_honestly_as_before(copied: House) -> None:
    (copied.folder / "runs" / "a" / "inputs.json").unlink()
    (copied.folder / "pictures" / "01.txt").write_text("another TOK")
    assert refusal(copied, copied.folder / "a.toml") == (
        "the images, the captions or the base model are not the ones it was trained on"
    )


@pytest.mark.parametrize("text", ["", "[]", '{"pictures": 1}', '{"pictures": {"a": 1}, "captions": {}, "base": {}}'])
def test_a_damaged_list_of_files_is_none(copied: House, text: str) -> None:
    (copied.folder / "runs" / "a" / "inputs.json").write_text(text)
    assert goes_on(copied, copied.folder / "a.toml").startswith("done: ")
    (copied.folder / "pictures" / "01.txt").write_text("another TOK")
    assert refusal(copied, copied.folder / "a.toml").startswith("the images, the captions or the base model are not")


def test_digests_of_a_base_change_with_its_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(BUILTIN["builtin:tiny"], folder)
    before, whole = file_digests(folder), fingerprint(folder)
    assert fingerprint(BUILTIN["builtin:tiny"]) == whole
    path = folder / "transformer" / "config.json"
    path.write_text(path.read_text() + " ")
    after = file_digests(folder)
    assert [name for name in before if before[name] != after[name]] == ["transformer/config.json"]
    assert fingerprint(folder) != whole


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_only_keys_that_were_set_are_told(copied: House) -> None:
    """Neither lora.alpha, which follows the rank, nor another learning rate that follows train.lr."""
    assert refusal(copied, copied.spec(rank="rank = 8")) == "lora.rank: 4 -> 8"
    assert refusal(copied, copied.spec(rank="rank = 8\nalpha = 2")) == "lora.rank: 4 -> 8; lora.alpha: 4.0 -> 2.0"
    text = copied.spec().read_text().replace("lr = 1e-2\n", "").replace("lr = 1e-3", "lr = 1e-4")
    told = refusal(copied, copied.write("a.toml", text))
    assert told == "inversion.lr: 0.01 -> 0.0001; train.lr: 0.001 -> 0.0001", (
        "the row's own rate was set, and is not now"
    )


def test_a_rate_that_follows_another_is_not_told_again(house: House) -> None:
    rates = {"drop": "[inversion]"}
    text = house.spec("a", **rates).read_text()
    [job] = prepare_jobs([house.write("a.toml", text)], house.folder / "runs", fetch=True, fresh=False)
    claim_run(job.run, job.spec, job.plan, "0.1.0", job.source.origin)
    job.run.release()
    assert refusal(house, house.write("a.toml", text.replace("lr = 1e-3", "lr = 1e-4"))) == "train.lr: 0.001 -> 0.0001"


# (what is changed of the spec, why it cannot go on, what to set instead)
SPANS: dict[str, tuple[dict[str, str], str, dict[str, str]]] = {
    "longer, so the pivot comes later": (
        {"steps": "steps = 12"},
        "train.steps: 6 -> 12; it is at step 6 already; a phase of it ended at step 3, and would now end at step 6; set "
        "inversion.until = 0.25, with which it goes on",
        {"steps": "steps = 12", "encoders": 'encoders = ["clip", "t5"]\nuntil = 0.25'},
    ),
    "shorter": (
        {"steps": "steps = 4"},
        "train.steps: 6 -> 4; it is at step 6 already; a phase of it ended at step 3, and would now end at step 2; set "
        "train.steps = 6, with which it goes on",
        {"steps": "steps = 6"},
    ),
    "the LoRA stops earlier": (
        {"rank": "rank = 4\nuntil = 0.75"},
        "lora.until: 1.0 -> 0.75; it is at step 6 already, and this phase would now end at step 5; set lora.until = 1, with "
        "which it goes on",
        {"rank": "rank = 4\nuntil = 1"},
    ),
    "no LoRA at all": (
        {"rank": "rank = 4\nuntil = 0"},
        "lora.until: 1.0 -> 0.0; steps 1 to 3 have trained the text side and the LoRA, and would "
        "now train the text side; set inversion.until = 0.5 and lora.until = 1, with which it goes on",
        {"rank": "rank = 4\nuntil = 1", "encoders": 'encoders = ["clip", "t5"]\nuntil = 0.5'},
    ),
    "a pivot that does not divide": (
        {"steps": "steps = 7"},
        "train.steps: 6 -> 7; it is at step 6 already; a phase of it ended at step 3, and would now end at step 4; set "
        "inversion.until = 0.4, with which it goes on",
        {"steps": "steps = 7", "encoders": 'encoders = ["clip", "t5"]\nuntil = 0.4'},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPANS)
def test_a_run_of_other_phases_goes_on_with_the_keys_that_are_named(copied: House, name: str) -> None:
    changed, said, followed = SPANS[name]
    assert refusal(copied, copied.spec(**changed)) == said
    assert goes_on(copied, copied.spec(**followed)).startswith(("resume: ", "done: "))


def test_advice_on_phases_is_right_wherever_it_is_given(house: House) -> None:
    """For many pairs of specs: what is advised keeps every step trained so far, which is asked of the plans' own
    keys."""
    [job] = prepare_jobs([house.spec()], house.folder / "runs", fetch=True, fresh=False)
    from runner.jobs.bases import BaseRegistry
    from runner.jobs.prepare import facts_of
    from runner.plan.description import as_json
    from runner.plan.phases import Facts

    facts: Facts = facts_of(job.spec, job.pictures, BaseRegistry().of(job.spec))

    def planned(steps: int, text: float, lora: float):  # type: ignore[no-untyped-def]
        spec = job.spec.model_copy(
            update={
                "train": job.spec.train.model_copy(update={"steps": steps}),
                "inversion": job.spec.inversion.model_copy(update={"until": text}),
                "lora": job.spec.lora.model_copy(update={"until": lora}),
            }
        )
        return spec, make_plan(spec, facts)

    shares, followed = (0.1, 0.25, 0.5, 0.75, 1.0), 0
    for steps, text, lora in [(20, one, other) for one in shares for other in (0.0, *shares)]:
        _, old = planned(steps, text, lora)
        for more, text2, lora2 in [(20, 0.5, 1.0), (40, 0.5, 1.0), (30, 1.0, 0.5), (10, 0.5, 1.0), (40, 0.25, 0.0)]:
            spec, new = planned(more, text2, lora2)
            for phase in old.training:
                step = phase.stop
                if step <= {one.key: one.stop for one in new.training}.get(phase.key, -1):
                    continue
                told = list(resume_advice(as_json(old), spec, new, step))
                line = next((one for one in told if one.startswith("set ")), None)
                if line is None:
                    continue
                keys = dict(one.split(" = ") for one in line.removeprefix("set ").partition(", with")[0].split(" and "))
                _, mended = planned(
                    int(keys.get("train.steps", more)),
                    float(keys.get("inversion.until", text2)),
                    float(keys.get("lora.until", lora2)),
                )
                assert step <= {one.key: one.stop for one in mended.training}.get(phase.key, -1), (line, step)
                followed += 1
    assert followed > 100
