"""The plan: phases, words, and the JSON that others read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from runner.base.layers import FLUX1
from runner.plan import description
from runner.plan.build import make_plan
from runner.plan.phases import Facts
from runner.spec.schema import Spec
from tests.support.house import House
from tests.support.paths import PROJECT
from tests.support.plans import FACTS, TOKENS, spec_of

Described = tuple[str, int, int, list[str], list[str]]  # kind, start, stop, what it trains, what it holds


def phases(spec: Spec) -> list[Described]:
    described = [description.describe(phase) for phase in make_plan(spec, FACTS).phases]
    return [
        (facts["kind"], facts["start"], facts["stop"], [part["what"] for part in facts["trains"]], facts["resident"])
        for facts in described
    ]


ALL = ["text_encoder", "text_encoder_2", "transformer", "vae"]
EXPORT: Described = (
    "export",
    7,
    7,
    [],
    ["text_encoder", "transformer"],
)  # no picture is drawn, and T5 has learned nothing
EXPORT_WITH_T5: Described = ("export", 7, 7, [], ALL[:3])


def test_plain_lora(tmp_path: Path) -> None:
    assert phases(spec_of(tmp_path)) == [
        ("encode", 0, 0, [], ["text_encoder", "text_encoder_2", "vae"]),
        ("lora", 0, 7, ["lora"], ["transformer"]),
        EXPORT,
    ]


def test_clip_pivotal_pivots_at_a_step_and_ends_with_the_transformer_alone(tmp_path: Path) -> None:
    assert phases(spec_of(tmp_path, TOKENS)) == [
        ("encode", 0, 0, [], ["text_encoder_2", "vae"]),
        ("joint", 0, 4, ["token rows", "lora"], ["transformer", "text_encoder"]),  # ceil(0.5 * 7)
        ("encode", 4, 4, [], ["text_encoder"]),
        ("lora", 4, 7, ["lora"], ["transformer"]),
        EXPORT,
    ]


def test_t5_too(tmp_path: Path) -> None:
    assert phases(spec_of(tmp_path, TOKENS + '[inversion]\nencoders = ["clip", "t5"]\n')) == [
        ("encode", 0, 0, [], ["vae"]),
        ("joint", 0, 4, ["token rows", "lora"], ["transformer", "text_encoder", "text_encoder_2"]),
        ("encode", 4, 4, [], ["text_encoder", "text_encoder_2"]),
        ("lora", 4, 7, ["lora"], ["transformer"]),
        EXPORT_WITH_T5,
    ]


def test_pure_inversion_of_half_the_steps_says_so(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, TOKENS + "[lora]\nuntil = 0\n[inversion]\nuntil = 0.5\n")
    assert [row[:4] for row in phases(spec)] == [
        ("encode", 0, 0, []),
        ("inversion", 0, 4, ["token rows"]),
        ("export", 4, 4, []),
    ]
    made = make_plan(spec, FACTS)
    assert made.steps == 4
    assert made.notes[0] == (
        "nothing is left to train after step 4 (lora.until = 0, inversion.until = 0.5): the run ends there, not at the 7 steps asked for"
    )
    assert make_plan(spec_of(tmp_path, TOKENS + "[lora]\nuntil = 0\n"), FACTS).steps == 7


def test_a_base_that_is_told_no_guidance(tmp_path: Path) -> None:
    for embeds in (True, False):
        facts = Facts(("a TOK",), 8, "data", "base", {**FLUX1, "guidance_embeds": embeds})
        told = [note for note in make_plan(spec_of(tmp_path), facts).notes if "train.guidance has no effect" in note]
        assert len(told) == (not embeds)


def test_captions_without_the_token_are_counted(tmp_path: Path) -> None:
    facts = Facts(("a TOK", "a TOKYO", "a hill"), 8, "data", "base", None)
    assert make_plan(spec_of(tmp_path, TOKENS), facts).notes[-1] == (
        "2 of 3 captions name no token, so their images teach it nothing (the first is 'a TOKYO'); write TOK into them, "
        "if that was not meant"
    )
    assert not [note for note in make_plan(spec_of(tmp_path), facts).notes if "captions" in note]


def test_one_epoch_at_a_half_still_inverts(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, TOKENS).model_copy(
        update={"train": spec_of(tmp_path).train.model_copy(update={"steps": None, "epochs": 1})}
    )
    made = make_plan(spec, FACTS)
    assert [(phase.start, phase.stop) for phase in made.training] == [(0, 4), (4, 8)]


def test_every_value_that_changes_the_result_changes_the_key(tmp_path: Path) -> None:
    first = make_plan(spec_of(tmp_path), FACTS)
    for extra in (
        "batch_size = 2",
        "guidance = 1.0",
        "[lora]\ndropout = 0.1",
        '[model]\nquantize = "int8"\n',
        "[data.x]"[:0] + "[optimizer]\nbeta1 = 0.8",
    ):
        assert make_plan(spec_of(tmp_path, extra), FACTS).training[-1].key != first.training[-1].key, extra
    for facts in (Facts(("a TOK",), 8, "other", "base", None), Facts(("a TOK",), 8, "data", "other", None)):
        assert make_plan(spec_of(tmp_path), facts).training[-1].key != first.training[-1].key
    for extra in (
        "[checkpoint]\nevery = 3",
        '[validate]\nprompts = ["x"]',
        "[track]\nto = []",
        '[model]\noffload = "blocks"\n',
        "[model]\ngradient_checkpointing = true\n",
    ):
        assert make_plan(spec_of(tmp_path, extra), FACTS).training[-1].key == first.training[-1].key, extra
    assert make_plan(spec_of(tmp_path, '[validate]\nprompts = ["x"]'), FACTS).key != first.key
    keys = [
        make_plan(spec_of(tmp_path, TOKENS + line), FACTS).key
        for line in ("", "[inversion]\ngradient_checkpointing = 2\n")
    ]
    assert keys[0] == keys[1]
    keys = []
    for line in ("", "gradient_checkpointing = true\n"):
        keys.append(make_plan(spec_of(tmp_path, f"[model]\ncompile = true\n{line}"), FACTS).key)
    assert keys[0] != keys[1]  # compiled code that is recomputed rounds otherwise


def test_the_plan_knows_how_many_texts_a_batch_can_have(tmp_path: Path) -> None:
    def texts(facts: Facts = FACTS, extra: str = "") -> int | None:
        return make_plan(spec_of(tmp_path, extra), facts).distinct_texts

    assert texts() == 1
    assert texts(replace(FACTS, captions=("a TOK", "b", "c"))) == 3
    assert texts(extra='[prior]\nimages = "x"\nprompt = "a thing"\n') == 2
    assert texts(extra='[prior]\nimages = "x"\nprompt = "a TOK"\n') == 1
    assert texts(replace(FACTS, captions=None)) is None


def test_the_shipped_specs_plan_without_the_models_files(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "specs", tmp_path / "specs")
    house = House.__new__(House)
    house.folder = tmp_path
    said = house.fluxrun("plan", "specs", "--json")
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert document["errors"] == []
    found = {run["name"]: [phase["kind"] for phase in run["phases"]] for run in document["runs"]}
    assert found == {
        "quickstart": ["encode", "joint", "encode", "lora", "export"],
        "3d-icon-Flux-LoRA": ["encode", "joint", "encode", "lora", "export"],
        "3d-icon-Flux-LoRA-t5": ["encode", "joint", "encode", "lora", "export"],
        "3d-icon-Flux-LoRA-inversion": ["encode", "inversion", "export"],
    }
    [first] = [run for run in document["runs"] if run["name"] == "3d-icon-Flux-LoRA"]
    assert first["phases"][1].pop("memory")["total"] == pytest.approx(26 * 2**30, rel=0.02)
    assert first["phases"][1] == {
        "kind": "joint",
        "name": "joint",
        "start": 0,
        "stop": 350,
        "trains": [
            {"what": "token rows", "encoders": ["clip"], "parameters": 2 * 768},
            {
                "what": "lora",
                "parameters": 8 * (19 * (8 * 2 + 4 * 5) + 38 * 3 * 2) * 3072,
            },  # 8 d x d and 4 d x 4d, 3 d x d
        ],
        "resident": ["transformer", "text_encoder"],
    }
    assert {"name", "spec", "state", "reason", "phases"} <= first.keys()
    assert not (tmp_path / "runs").exists()


def test_made_pictures_cannot_become_training_pictures(tmp_path: Path) -> None:
    house = House(tmp_path)
    spec = house.spec(source='source = "."', steps="steps = 2")
    said = house.fluxrun("plan", spec)
    assert said.code == 2
    assert (
        "a.toml:5: data.source: it holds the runs folder runs, so pictures made there would be trained on" in said.err
    )
    assert house.fluxrun("plan", spec, "--runs", tmp_path.parent / "runs").code == 0
    prior = '[prior]\nimages = "pictures/classes"\nprompt = "a heart"\n'
    said = house.fluxrun("plan", house.write("b.toml", house.spec().read_text() + prior))
    assert said.code == 2
    assert "prior.images: it lies inside data.source pictures, so pictures made there would be trained on" in said.err


def test_a_misspelt_folder_is_one_fault_with_the_nearest_name(tmp_path: Path) -> None:
    house = House(tmp_path)
    said = house.fluxrun("plan", house.spec(source='source = "picturse"', steps="epochs = 2"))
    [fault, _] = said.err.splitlines()
    assert fault.startswith(f"{tmp_path}/a.toml:5: data.source: no such folder (found 'picturse')")
    assert fault.endswith("did you mean pictures?")


def test_the_plan_in_words(tmp_path: Path) -> None:
    house = House(tmp_path)
    said = house.fluxrun("plan", house.spec())
    assert said.out.splitlines() == [
        f"a  ({tmp_path}/a.toml)  new: no run folder yet",
        "  images         10 at 64x64; none is dropped",
        "  encode                         trains nothing; on the device: vae",
        "  joint          steps 1-3       token rows in clip+t5 (320 parameters), lora (20,480 parameters); "
        "on the device: transformer, text_encoder, text_encoder_2",
        "  encode-learned                 trains nothing; on the device: text_encoder, text_encoder_2",
        "  lora           steps 4-6       lora (20,480 parameters); on the device: transformer",
        "  export                         trains nothing; on the device: text_encoder, text_encoder_2, transformer, vae",
        "  memory: about encode 68 MiB, joint 73 MiB, encode-learned 69 MiB, lora 71 MiB, export 73 MiB",
        "  fits a card of 8 GB (845 MiB for export, margin included)",
        "  in the cache: latents 0 of 10; 80 KiB to make",
        "1 run, 6 steps",
    ]
    faulty = house.fluxrun("plan", house.write("b.toml", "x = 1"), "--json")
    assert faulty.code == 2
    assert {"file", "line", "key", "message"} == json.loads(faulty.out)["errors"][0].keys()
