"""The exports in their users' hands: stock diffusers, as the reference's README tells people to load them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import House
from PIL import Image
from safetensors.torch import load_file, save_file

from runner import export, flux, sample, tokens
from runner.basefiles import BUILTIN
from runner.checkpoint import Weights, read
from runner.errors import BadFile
from runner.lora import LoraShape

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
    assert said.err == "fluxrun: runs/nothing/export: no exports; `fluxrun status` tells how far the run is\n"


def shape_of(weights: Weights) -> LoraShape:
    return LoraShape(4, 4.0, 0.0, tuple(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in weights.lora)))


@pytest.fixture(scope="module")
def trained(done: House) -> Weights:
    return read(done.folder / "runs" / "a" / "checkpoints" / "step-000006.safetensors").weights


BASE = flux.Base(BUILTIN["builtin:tiny"], None, torch.device("cpu"), torch.float32)


def test_a_wrong_value_in_the_lora_file_is_found_by_its_layer(done: House, trained: Weights, tmp_path: Path) -> None:
    file = done.folder / "runs" / "a" / "export" / export.LORA_FILE
    shape = shape_of(trained)
    pipe = sample.image_pipeline(BASE)
    sample.load_lora(pipe, file)
    export.verify_lora(pipe.transformer, trained.lora, shape)  # as it is, it passes
    with pytest.raises(BadFile, match="reads back with scale 1.0, trained was 2.0"):
        export.verify_lora(pipe.transformer, trained.lora, LoraShape(4, 8.0, 0.0, shape.layers))
    changed = dict(trained.lora)
    name = next(iter(changed))
    changed[name] = changed[name] + 1e-6
    with pytest.raises(BadFile, match=name.replace(".", r"\.")):
        export.verify_lora(pipe.transformer, changed, shape)


def test_a_wrong_row_is_found_by_its_encoder(done: House, trained: Weights, tmp_path: Path) -> None:
    known = tokens.placeholders([("TOK", 2, None)])
    rows = load_file(done.folder / "runs" / "a" / "export" / "a_emb.safetensors")
    rows["t5"][1, 3] += 1e-6
    save_file(rows, tmp_path / "bad.safetensors")
    pipe = sample.text_pipeline(BASE, sample.Exported(None, tmp_path / "bad.safetensors", known))
    with pytest.raises(BadFile, match="t5 embeddings read back with other values"):
        export.verify_embeddings(pipe, trained, ["<s0>", "<s1>"])


def test_alpha_survives_the_export(house: House) -> None:
    """alpha / rank = 4: lost, the picture would be another one."""
    spec = house.spec(rank="rank = 4\nalpha = 16.0", steps="steps = 2")
    assert house.fluxrun("queue", spec).code == 0
    pipe = sample.image_pipeline(BASE)
    sample.load_lora(pipe, house.folder / "runs" / "a" / "export" / export.LORA_FILE)
    scales = {m.scaling[name] for m in pipe.transformer.modules() if hasattr(m, "scaling") for name in m.scaling}
    assert scales == {4.0}


def test_the_card_tells_what_to_type(done: House) -> None:
    card = (done.folder / "runs" / "a" / "export" / "README.md").read_text()
    assert "base_model: builtin:tiny" in card
    assert "`<s0><s1>` is what the training captions call TOK" in card
    assert 'load_file("a_emb.safetensors")' in card
    assert str(done.folder) not in card
    [code] = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    compile(code, "card", "exec")


def test_tensorboard_events_read_back(done: House) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(done.folder / "runs" / "a"))
    events.Reload()
    train = {"train/loss", "train/lr", "train/grad_norm", "train/step_seconds"}
    evaluation = {"eval/loss", *(f"eval/sigma 0.{k}" for k in range(1, 10))}
    rows = {f"rows/{what} TOK {encoder}" for what in ("norm", "drift") for encoder in ("clip", "t5")}
    run = {"run/train_loss", "run/s_per_step", "run/peak_memory_GiB"}
    assert set(events.Tags()["scalars"]) == train | evaluation | rows | run
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Tags()["images"] == ["samples/a-TOK-on-a-white-background/0"]
