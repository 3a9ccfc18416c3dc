"""The exports in their users' hands: stock diffusers, as the reference's README tells people to load them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from runner.base.files import BUILTIN, licence
from runner.checkpoint.storage import Weights, read
from runner.core import locks, safetensors
from runner.core.errors import BadFileError
from runner.data import tokens
from runner.export import formats, pipeline, verify
from runner.export.lora_layouts import to_kohya
from runner.model import base, tensors
from runner.model.flux1 import loading
from runner.model.flux1.pipeline import Flux1ImagePipeline, Flux1TextPipeline
from runner.model.lora import LoraShape
from runner.runs.run import Run
from runner.spec.schema import Token
from runner.training.phases.export import export_day
from tests.support.cards import card_of
from tests.support.house import House
from tests.support.readers import comfyui_embedding, diffusers_reads_kohya, forge_embedding
from tests.support.runs import export_bytes, stopping_after

SEED = 3


def test_the_readmes_inference_code_draws_what_fluxrun_sample_draws(done: House) -> None:
    """diffusers' README_flux.md, "Inference - pivotal tuning", with the tiny base in FLUX.1-dev's place.

    Its call passes `cross_attention_kwargs`, which FluxPipeline does not take; the scale goes in
    `joint_attention_kwargs`, and 1.0 is the default.
    """
    from diffusers import AutoPipelineForText2Image

    folder = done.folder / "runs" / "a" / "export"
    pipe = AutoPipelineForText2Image.from_pretrained(BUILTIN["builtin:tiny"], dtype=torch.float32)
    pipe.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    text_encoders = [pipe.text_encoder, pipe.text_encoder_2]
    tokenizers = [pipe.tokenizer, pipe.tokenizer_2]
    state_dict = load_file(folder / "a_emb.safetensors")
    pipe.load_textual_inversion(
        state_dict["clip_l"], token=["<s0>", "<s1>"], text_encoder=text_encoders[0], tokenizer=tokenizers[0]
    )
    pipe.load_textual_inversion(
        state_dict["t5"], token=["<s0>", "<s1>"], text_encoder=text_encoders[1], tokenizer=tokenizers[1]
    )
    instance_token = "<s0><s1>"
    image = pipe(
        prompt=f"a {instance_token} on a white background", num_inference_steps=4, guidance_scale=3.5, height=64, width=64,
        max_sequence_length=32, joint_attention_kwargs={"scale": 1.0}, generator=torch.Generator().manual_seed(SEED),
    ).images[0]  # fmt: skip

    said = done.fluxrun(
        "sample", "a", "--prompt", "a TOK on a white background", "--steps", "4", "--seed", str(SEED), "--out", "drawn"
    )
    assert said.code == 0, said.err
    [path] = said.out.split()
    ours = Image.open(done.folder / path)
    assert np.array_equal(np.asarray(ours), np.asarray(image))


def test_sample_and_the_runs_own_pictures_agree(done: House) -> None:
    said = done.fluxrun("sample", "a", "--out", "again")
    assert said.code == 0, said.err
    own = done.folder / "runs" / "a" / "samples" / "step-000006-0.png"
    before = done.folder / "runs" / "a" / "samples" / "step-000000-0.png"
    drawn = (done.folder / said.out.strip()).read_bytes()
    assert drawn == own.read_bytes()
    assert drawn != before.read_bytes()


def test_sample_tells_what_is_missing(done: House) -> None:
    said = done.fluxrun("sample", "nothing")
    assert said.code == 1
    assert said.err == "fluxrun: runs/nothing/export: no exports; `fluxrun status` shows how far the run is\n"


def shape_of(weights: Weights) -> LoraShape:
    return LoraShape(4, 4.0, 0.0, tuple(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in weights.lora)))


@pytest.fixture(scope="module")
def trained(done: House) -> Weights:
    return read(done.folder / "runs" / "a" / "checkpoints" / "step-000006.safetensors").weights


BASE = base.Base(BUILTIN["builtin:tiny"], None, torch.device("cpu"), torch.float32)


def test_a_wrong_value_in_the_lora_file_is_found_by_its_layer(done: House, trained: Weights) -> None:
    file = done.folder / "runs" / "a" / "export" / formats.LORA_FILE
    shape, stored = shape_of(trained), formats.rounded(trained, torch.bfloat16)
    pipe = Flux1ImagePipeline.load(BASE, loading.load_transformer(BASE))
    pipe.load_lora(file)
    verify.loaded_lora(pipe.transformer, stored.lora, shape)  # as it is, it passes
    with pytest.raises(BadFileError, match="reads back with scale 1.0, trained was 2.0"):
        verify.loaded_lora(pipe.transformer, stored.lora, LoraShape(4, 8.0, 0.0, shape.layers))
    changed = dict(stored.lora)
    name = next(iter(changed))
    changed[name] = changed[name] * (1 + 2**-7)  # the last bit of bf16
    with pytest.raises(BadFileError, match=name.replace(".", r"\.")):
        verify.loaded_lora(pipe.transformer, changed, shape)


def test_a_wrong_row_is_found_by_its_encoder(done: House, trained: Weights, tmp_path: Path) -> None:
    known = tokens.placeholders([Token(name="TOK")])
    stored = formats.rounded(trained, torch.bfloat16)
    rows = load_file(done.folder / "runs" / "a" / "export" / "a_emb.safetensors")
    rows["t5"][1, 3] *= 1 + 2**-7
    tensors.save(tmp_path / "bad.safetensors", rows, {})
    pipe = Flux1TextPipeline.load(BASE)
    pipeline.load_embeddings(pipe, tmp_path / "bad.safetensors", known)
    with pytest.raises(BadFileError, match="t5 embeddings read back in diffusers with other values"):
        verify.loaded_embeddings(pipe.encoders, stored, ["<s0>", "<s1>"])
    with pytest.raises(BadFileError, match=r"bad.safetensors: t5 holds other rows than were learned"):
        verify.embeddings(tmp_path / "bad.safetensors", trained, torch.bfloat16)


@pytest.mark.parametrize(("file", "key"), [("a_emb", "clip_l"), ("a_emb", "t5xxl")])
def test_embeddings_by_comfyuis_rules(done: House, trained: Weights, file: str, key: str) -> None:
    folder = done.folder / "runs" / "a" / "export"
    rows = trained.rows["clip" if key == "clip_l" else "t5"].bfloat16()
    found = comfyui_embedding(folder / f"{file}.safetensors", key, rows.shape[1])
    assert found is not None
    assert torch.equal(found, rows)
    # the one-key file serves CLIP there too; T5 then ignores it
    found = comfyui_embedding(folder / "a_emb_webui.safetensors", key, rows.shape[1])
    assert (found is None) == (key == "t5xxl")


def test_embeddings_by_forges_rules(done: House, trained: Weights) -> None:
    folder = done.folder / "runs" / "a" / "export"
    assert torch.equal(forge_embedding(folder / "a_emb_webui.safetensors"), trained.rows["clip"].bfloat16().float())
    with pytest.raises(AssertionError, match="multiple terms"):
        forge_embedding(folder / "a_emb.safetensors")


def test_alpha_survives_the_export(house: House) -> None:
    """alpha / rank = 4: lost, the picture would be another one. In diffusers' layout it is in the weights."""
    spec = house.spec(rank="rank = 4\nalpha = 16.0", steps="steps = 2")
    assert house.fluxrun("queue", spec).code == 0
    pipe = Flux1ImagePipeline.load(BASE, loading.load_transformer(BASE))
    pipe.load_lora(house.folder / "runs" / "a" / "export" / formats.LORA_FILE)
    scales = {m.scaling[name] for m in pipe.transformer.modules() if hasattr(m, "scaling") for name in m.scaling}
    assert scales == {1.0}
    folder = house.folder / "runs" / "a"
    learned = read(folder / "checkpoints" / "step-000002.safetensors").weights.lora
    stored = load_file(folder / "export" / formats.LORA_FILE)
    for name, value in learned.items():
        scale = 4 if ".lora_B." in name else 1
        assert torch.equal(stored[f"transformer.{name}"], (scale * value).bfloat16())
    named = load_file(house.folder / "runs" / "a" / "export" / "a.safetensors")
    ratios = {
        named[key].item() / named[key.replace("alpha", "lora_down.weight")].shape[0] for key in named if "alpha" in key
    }
    assert ratios == {4.0}


def test_the_original_layout_draws_the_runs_picture(done: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained pivotal run, its LoRA from NAME.safetensors by diffusers' own reader of such files."""
    diffusers_reads_kohya(monkeypatch, 128)
    run = done.folder / "runs" / "a"
    known = tokens.placeholders([Token(name="TOK")])
    exported = pipeline.ExportedFiles(run / "export" / "a.safetensors", run / "export" / "a_emb.safetensors", known)
    shots = [("a TOK on a white background", 0)]
    [picture] = pipeline.draw_samples(BASE, exported, shots, length=32, steps=2, size=64)
    with Image.open(run / "samples" / "step-000006-0.png") as own:
        assert np.abs(np.asarray(own).astype(int) - np.asarray(picture)).max() <= 1


def test_the_metadata_that_webuis_show(done: House) -> None:
    path = done.folder / "runs" / "a" / "export" / "a.safetensors"
    header = safetensors.read_metadata(path)
    wanted = {
        "ss_output_name": "a", "ss_network_dim": "4", "ss_network_alpha": "4.0", "ss_network_module": "networks.lora_flux",
        "ss_base_model_version": "flux1", "ss_sd_model_name": "builtin:tiny", "ss_resolution": "(64, 64)", "ss_steps": "6",
        "ss_tag_frequency": '{"a": {"a_emb_webui": 1}}', "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux", "modelspec.title": "a",
        "modelspec.resolution": "64x64", "modelspec.trigger_phrase": "a_emb_webui", "modelspec.license": "apache-2.0",
        "modelspec.usage_hint": "diffusers: TOK is <s0><s1>; ComfyUI: embedding:a_emb; WebUI: a_emb_webui",
    }  # fmt: skip
    assert {key: header.get(key) for key in wanted} == wanted
    assert header["modelspec.date"] == "2026-01-31"  # SOURCE_DATE_EPOCH, see tests/__init__.py
    assert header["ss_training_started_at"] == str(int(datetime(2026, 1, 31, tzinfo=UTC).timestamp()))
    content = path.read_bytes()
    tensors_begin = 8 + struct.unpack("<Q", content[:8])[0]
    assert header["sshs_model_hash"] == hashlib.sha256(content[tensors_begin:]).hexdigest()
    assert header["modelspec.hash_sha256"] == f"0x{header['sshs_model_hash']}"
    assert str(done.folder) not in "".join(header.values())


def test_the_day_is_the_one_on_which_the_run_began(done: House, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(done.folder / "runs", "a")
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    began = json.loads(run.state_file.read_text())["started"]
    assert export_day(run) == datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d")
    assert export_day(Run(done.folder / "runs", "never")) is None


# ---- what goes wrong fails the run; what is asked otherwise is made again --------------------------------------------


def test_a_mismatch_fails_the_run_with_the_layers_name(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*arguments: Any) -> dict[str, Any]:
        named = to_kohya(*arguments)
        named["lora_unet_single_blocks_1_linear1.lora_up.weight"][130] += 0.01  # a row of k
        return named

    monkeypatch.setattr(formats, "to_kohya", damaged)
    spec = house.spec(steps="steps = 2", prompts="prompts = []")
    said = house.fluxrun("queue", spec)
    assert said.code == 1
    wrong = "a.safetensors: single_transformer_blocks.1.attn.to_k changes its layer otherwise than was trained"
    assert wrong in said.err
    [row] = json.loads(house.fluxrun("status", "--json").out)
    assert row["state"] == "failed"
    assert wrong in row["error"]
    assert not (house.folder / "runs" / "a" / "export").exists()


def test_another_dtype_exports_again_and_trains_nothing(house: House) -> None:
    errors = {}
    for dtype, kind in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        spec = house.spec(steps="steps = 2", prompts="prompts = []")
        spec.write_text(spec.read_text() + f'[export]\ndtype = "{dtype}"\n')
        said = house.fluxrun("queue", spec)
        assert said.code == 0, said.err
        assert ("joint: skipped, trained to step 2" in said.err) == (dtype != "fp32")
        folder = house.folder / "runs" / "a" / "export"
        found = [load_file(path) for path in folder.glob("*.safetensors")]
        assert len(found) == 4
        assert {value.dtype for one in found for key, value in one.items() if not key.endswith(".alpha")} == {kind}
        [record] = json.loads(house.fluxrun("results", "--json").out)
        errors[dtype] = record["export_error"]
    assert errors["fp32"] < 1e-8 < errors["fp16"] < errors["bf16"] < 0.02


@pytest.fixture
def mine(done: House, tmp_path: Path) -> House:
    """The finished run, to change."""
    shutil.copytree(done.folder / "runs", tmp_path / "runs")
    house = House.__new__(House)
    house.folder = tmp_path
    return house


def test_export_again_and_from_an_earlier_step(mine: House) -> None:
    run = mine.folder / "runs" / "a"
    first = export_bytes(run)
    said = mine.fluxrun("export", "a", "--step", "4")
    assert said.code == 0, said.err
    assert said.out.split() == [
        f"runs/a/export/{name}.safetensors" for name in ("a", "a_emb", "a_emb_webui", "pytorch_lora_weights")
    ]
    assert "a: exporting step 4" in said.err
    wanted = read(run / "checkpoints" / "step-000004.safetensors").weights
    lora = load_file(run / "export" / formats.LORA_FILE)
    assert all(torch.equal(lora[f"transformer.{name}"], value.bfloat16()) for name, value in wanted.lora.items())
    assert "Trained on `builtin:tiny` by fluxrun, 4 steps." in (run / "export" / "README.md").read_text()
    fourth = export_bytes(run)
    assert mine.fluxrun("export", "a", "--step", "4").code == 0
    assert export_bytes(run) == fourth != first
    assert json.loads((run / "state.json").read_text())["exported_step"] == 4
    assert mine.fluxrun("export", "a").code == 0
    assert export_bytes(run) == first
    assert json.loads((run / "state.json").read_text())["state"] == "done"


def test_export_tells_what_is_missing(mine: House) -> None:
    said = mine.fluxrun("export", "a", "--step", "5")
    assert said.code == 1
    assert said.err == ("fluxrun: --step 5: no checkpoint of this step in runs/a/checkpoints; there are: 2, 3, 4, 6\n")
    said = mine.fluxrun("export", "b")
    assert said.err == "fluxrun: runs/b: no such run; `fluxrun status` lists the runs there are\n"
    shutil.rmtree(mine.folder / "runs" / "a" / "checkpoints")
    said = mine.fluxrun("export", "a")
    assert "runs/a/checkpoints: no checkpoint to export" in said.err
    with locks.hold_lock(mine.folder / "runs" / "a" / ".lock"):
        said = mine.fluxrun("export", "a")
    assert f"process {os.getpid()} is working on it; wait for it, or stop it" in said.err


def test_an_interrupted_run_exports_what_it_has(house: House) -> None:
    spec = house.spec(prompts="prompts = []", every="every = 50")
    with stopping_after(2):
        assert house.fluxrun("queue", spec).code == 3
    said = house.fluxrun("export", "a")
    assert said.code == 0, said.err
    run = house.folder / "runs" / "a"
    state = json.loads((run / "state.json").read_text())
    assert state["state"] == "stopped"
    assert state["export_error"] > 0
    wanted = read(run / "checkpoints" / "step-000002.safetensors").weights
    assert torch.equal(load_file(run / "export" / "a_emb.safetensors")["t5"], wanted.rows["t5"].bfloat16())
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err  # it goes on, and exports its last step
    assert "4 steps" not in (text := (run / "export" / "README.md").read_text())
    assert "6 steps." in text


# ---- fluxrun sample ----------------------------------------------------------------------------------------------


def test_runs_are_drawn_side_by_side(mine: House) -> None:
    shutil.copytree(mine.folder / "runs" / "a", mine.folder / "runs" / "b")
    for path in (mine.folder / "runs" / "b" / "export").glob("a*.safetensors"):
        path.rename(path.with_name(f"b{path.name.removeprefix('a')}"))
    said = mine.fluxrun("sample", "a", "b", "--seed", "7", "--count", "2", "--out", "drawn")
    assert said.code == 0, said.err
    names = [f"{run}-sample-0-seed{seed}.png" for run in "ab" for seed in (7, 8)]
    assert said.out.split() == [f"drawn/{name}" for name in [*names, "sample-sheet.png"]]
    drawn = [(mine.folder / "drawn" / name).read_bytes() for name in names]
    assert drawn[:2] == drawn[2:]  # one seed, one spec, one LoRA
    assert drawn[0] != drawn[1]
    with Image.open(mine.folder / "drawn" / "sample-sheet.png") as sheet:
        assert sheet.size == (8 + 2 * 200, 22 + 2 * (192 + 22 + 8))
        left, right = sheet.crop((8, 22, 200, 214)), sheet.crop((208, 22, 400, 214))
        assert left.tobytes() == right.tobytes()


def test_scale_is_the_loras_strength(mine: House) -> None:
    """At 0 the LoRA is gone and the tokens stay; the picture moves with it."""
    drawn = {}
    for scale in ("0", "1", "2"):
        said = mine.fluxrun("sample", "a", "--scale", scale, "--out", scale, "--prompt", "a red heart")
        assert said.code == 0, said.err
        drawn[scale] = (mine.folder / said.out.strip()).read_bytes()
    assert len(set(drawn.values())) == 3
    (mine.folder / "runs" / "a" / "export" / formats.LORA_FILE).unlink()
    said = mine.fluxrun("sample", "a", "--out", "none", "--prompt", "a red heart")
    assert (mine.folder / said.out.strip()).read_bytes() == drawn["0"]


# ---- the card ----------------------------------------------------------------------------------------------------


def test_the_card_tells_what_to_type(done: House) -> None:
    card, _ = card_of(done.folder / "runs" / "a")
    front = card.split("---\n")[1].splitlines()
    assert "base_model: builtin:tiny" in front
    assert "license: apache-2.0" in front
    assert "    url: samples/0.png" in front
    assert "`<s0><s1>` is what the training captions call TOK" in card
    assert "Put `a.safetensors` into `models/loras` and choose it in a *Load LoRA* node (LoraLoader)" in card
    assert "Put `a_emb.safetensors` into `models/embeddings` and write `embedding:a_emb` in the prompt" in card
    assert "`a a_emb_webui on a hill <lora:a:1>`" in card
    assert "| lora.rank | `4` |" in card
    assert str(done.folder) not in card
    export_folder = done.folder / "runs" / "a" / "export"
    for picture in ("samples/0.png", "samples/loss.png"):
        assert f"]({picture})" in card
        with Image.open(export_folder / picture) as image:
            assert len(image.getcolors(1 << 16) or []) > 3


@pytest.mark.parametrize(
    ("text", "front", "wanted"),
    [
        ("black-forest-labs/FLUX.1-dev", None, "flux-1-dev-non-commercial-license"),
        ("black-forest-labs/FLUX.1-schnell", None, "apache-2.0"),
        ("me/tune", "license: other\nlicense_name: mine\nlicense_link: TERMS.md", "mine"),
        ("me/unknown", None, None),
    ],
)
def test_the_bases_licence(tmp_path: Path, text: str, front: str | None, wanted: str | None) -> None:
    if front:
        (tmp_path / "README.md").write_text(f"---\n{front}\ntags:\n- x\n---\nlicense: no\n")
    found = licence(text, tmp_path)
    assert (found.get("license_name") or found.get("license")) == wanted
    if text == "me/tune":
        assert found["license_link"] == "https://huggingface.co/me/tune/blob/main/TERMS.md"
