"""What a run can do beside training: pictures and eval loss on the way, trackers, the hub, several processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from runner.base.files import BUILTIN
from runner.checkpoint import storage
from runner.jobs.prepare import prepare_jobs
from runner.model import token_rows
from runner.model.base import Base
from runner.model.flux1 import loading
from runner.tracking.history import read_history
from tests.support.house import House
from tests.support.runs import export_bytes, stopping_after

BASE = Base(BUILTIN["builtin:tiny"], None, torch.device("cpu"), torch.float32)


def weights(run: Path) -> dict[str, bytes]:
    """The exported tensors' files alone."""
    return {name: data for name, data in export_bytes(run).items() if name.endswith(".safetensors")}


def test_pictures_while_training_change_nothing_of_it(house: House) -> None:
    """Everything under [validate] may change between two runs of one training, and the weights stay."""
    quiet = house.spec("quiet", prompts="prompts = []")
    assert house.fluxrun("queue", quiet).code == 0
    prompts = 'prompts = ["a TOK on a white background", "a red heart"]\nevery = 2\ncount = 2\nsize = 48'
    drawn = house.spec("drawn", prompts=prompts, steps="steps = 6", center_crop="center_crop = true")
    drawn.write_text(drawn.read_text().replace("steps = 2", "steps = 3"))
    said = house.fluxrun("queue", drawn)
    assert said.code == 0, said.err
    runs = house.folder / "runs"
    ours, theirs = weights(runs / "quiet"), weights(runs / "drawn")
    assert ours["export/pytorch_lora_weights.safetensors"] == theirs["export/pytorch_lora_weights.safetensors"]
    assert ours["export/quiet_emb.safetensors"] == theirs["export/drawn_emb.safetensors"]
    found = sorted(path.name for path in (runs / "drawn" / "samples").glob("step-*.png"))
    assert found == [f"step-{step:06d}-{index}.png" for step in (0, 2, 4, 6) for index in range(4)]
    for name in found:
        with Image.open(runs / "drawn" / "samples" / name) as image:
            assert image.size == (48, 48)
    states = {name: json.loads((runs / name / "state.json").read_text()) for name in ("quiet", "drawn")}
    assert states["quiet"]["eval_loss"] == states["drawn"]["eval_loss"]
    [first, _] = [json.loads(line) for line in (runs / "index.jsonl").read_text().splitlines()]
    assert first["eval_loss"] == states["drawn"]["eval_loss"]


def test_the_last_look_is_what_the_exports_draw(house: House) -> None:
    """Pictures drawn by what is on the device are those that stock diffusers draws from the files."""
    prompts = 'prompts = ["a TOK on a white background"]\nevery = 2'
    early = house.spec("early", prompts=prompts, steps="steps = 4")
    early.write_text(early.read_text().replace("lr = 1e-2", "lr = 1e-2\nuntil = 1.0"))
    assert house.fluxrun("queue", early).code == 0
    short = house.spec("short", prompts=prompts, steps="steps = 2")
    exact = '[export]\ndtype = "fp32"\n'  # what is on the device is not rounded
    short.write_text(short.read_text().replace("lr = 1e-2", "lr = 1e-2\nuntil = 1.0") + exact)
    assert house.fluxrun("queue", short).code == 0
    runs = house.folder / "runs"
    name = "samples/step-000002-0.png"
    assert (runs / "early" / name).read_bytes() == (runs / "short" / name).read_bytes()


def test_pictures_that_fail_are_told_and_cost_nothing_else(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.training import validation

    def broken(*_: object) -> Any:
        raise torch.cuda.OutOfMemoryError("no memory left")

    monkeypatch.setattr(validation, "draw_samples", broken)
    said = house.fluxrun("queue", house.spec(prompts='prompts = ["a TOK"]\nevery = 2'))
    assert said.code == 0
    assert "a: no pictures at step 2: OutOfMemoryError: no memory left" in said.err
    assert "a: no pictures at step 4" in said.err


def test_only_the_newest_checkpoints_are_kept(house: House) -> None:
    said = house.fluxrun("queue", house.spec(every="every = 1\nkeep = 1", prompts="prompts = []"))
    assert said.code == 0
    kept = [path.name for path in sorted((house.folder / "runs" / "a" / "checkpoints").glob("*"))]
    # the newest, and the ends of the phases beside it
    assert kept == ["step-000003.safetensors", "step-000005.safetensors", "step-000006.safetensors"]


def test_two_processes_train_one_run(house: House) -> None:
    """As good as one process with twice the accumulation: the same loss and gradient in every step, its size included,
    with pictures held out. Here where a `runner` of the user's own lies, which is none of fluxrun's business."""
    (house.folder / "runner").mkdir()
    house.write("runner/__init__.py", 'raise SystemExit("another program\'s runner")\n')
    held = "center_crop = true\nholdout = 4"
    alone = house.spec("alone", batch_size="batch_size = 1\naccumulate = 2", center_crop=held)
    both = house.spec("both", batch_size="batch_size = 1", center_crop=held)
    exact = '[export]\ndtype = "fp32"\n'
    alone.write_text(alone.read_text() + exact)
    both.write_text(both.read_text() + exact + "[compute]\ngpus = 2\n")
    assert house.fluxrun("queue", alone, "--gpus", "cpu").code == 0
    process = house.start("queue", both, "--gpus", "cpu")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    runs = house.folder / "runs"
    one, two = (read_history(runs / name / "history.jsonl") for name in ("alone", "both"))
    assert list(one["train/loss"]) == [1, 2, 3, 4, 5, 6]
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
    for name, other in (("pytorch_lora_weights", "pytorch_lora_weights"), ("alone_emb", "both_emb")):
        ours = load_file(runs / "alone" / "export" / f"{name}.safetensors")
        theirs = load_file(runs / "both" / "export" / f"{other}.safetensors")
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.allclose(ours[key], theirs[key], atol=2e-4), key


def test_a_clip_lora_goes_through_stock_diffusers(house: House) -> None:
    from diffusers import FluxPipeline

    spec = house.spec("a", prompts='prompts = ["a red heart on a white background"]')
    text = spec.read_text()
    start, stop = text.index("[[tokens]]"), text.index("[lora]")
    spec.write_text(text[:start] + "[text_lora]\nrank = 4\nlr = 1e-2\nuntil = 0.5\n" + text[stop:])
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    run = house.folder / "runs" / "a"
    names = set(load_file(run / "export" / "pytorch_lora_weights.safetensors"))
    clip = {name for name in names if name.startswith("text_encoder.")}
    assert len(clip) == 2 * 2 * 4  # two layers, q k v out, A and B
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in clip)

    pipe = FluxPipeline.from_pretrained(BUILTIN["builtin:tiny"], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    draw = {
        "prompt": "a red heart on a white background", "num_inference_steps": 2, "guidance_scale": 3.5, "height": 64, "width": 64,
        "max_sequence_length": 32,
    }  # fmt: skip
    with torch.no_grad():
        plain = pipe.encode_prompt(draw["prompt"], None, max_sequence_length=32)[1]
    pipe.load_lora_weights(str(run / "export"), weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        adapted = pipe.encode_prompt(draw["prompt"], None, max_sequence_length=32)[1]
    assert not torch.equal(plain, adapted)
    image = pipe(**draw, generator=torch.Generator().manual_seed(0)).images[0]
    with Image.open(run / "samples" / "step-000006-0.png") as ours:
        assert ours.tobytes() == image.tobytes()


def test_class_images_that_changed_are_never_resumed_with(house: House) -> None:
    prior = '[prior]\nimages = "classes"\nprompt = "a red circle"\ncount = 2\n'
    spec = house.spec("a", every=f"every = 2\n{prior}")
    with stopping_after(2):
        assert house.fluxrun("queue", spec).code == 3
    first, second = sorted((house.folder / "classes").glob("*.png"))
    first.write_bytes(second.read_bytes())
    said = house.fluxrun("queue", spec)
    assert said.code == 1
    assert "the class images: runs/a was begun with " in said.err
    assert "...; put them back, or give this spec another `name`" in said.err


def test_a_run_goes_on_in_the_dtype_it_was_begun_in(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which depends on the device where the spec does not name it."""
    from runner.model import device

    spec = house.spec("a", every="every = 50", prompts="prompts = []")
    with stopping_after(1):
        assert house.fluxrun("queue", spec).code == 3
    monkeypatch.setattr(device, "resolve_dtype", lambda name, where: torch.bfloat16)
    said = house.fluxrun("queue", spec)
    assert said.code == 1
    assert "model.dtype: runs/a was begun with torch.float32, now it is torch.bfloat16; name it in the spec" in said.err


@pytest.mark.parametrize("kind", ["text lora", "prior", "fp16", "adamw8bit", "prodigy"])
def test_an_interrupted_run_ends_with_the_same_bytes(house: House, kind: str) -> None:
    """Stopped at step 2 and at step 4: once in each phase, where there are two."""
    spec = house.spec("a", every="every = 50", prompts="prompts = []")
    text = spec.read_text()
    start, stop = text.index("[[tokens]]"), text.index("[lora]")
    more = {
        "text lora": "[text_lora]\nrank = 2\nuntil = 0.5\n",
        "prior": '[prior]\nimages = "classes"\nprompt = "a red circle"\ncount = 2\n',
        "fp16": "",
        "prodigy": '[optimizer]\nname = "prodigy"\n',
        "adamw8bit": '[optimizer]\nname = "adamw8bit"\n',
    }[kind]
    if kind == "text lora":
        text = text[:start] + text[stop:]
    if kind == "fp16":
        text = text.replace("max_sequence", 'dtype = "fp16"\nmax_sequence')
    if kind == "prodigy":
        text = text.replace("lr = 1e-2\n", "").replace("lr = 1e-3", "lr = 1.0")
    if kind == "adamw8bit":
        text = text.replace("rank = 4", "rank = 32")  # from 4,096 numbers on, its moments have 8 bits
    spec.write_text(text + more)
    assert house.fluxrun("queue", spec, "--runs", "unbroken").code == 0

    for at in (2, 4):
        with stopping_after(at):
            said = house.fluxrun("queue", spec)
        assert said.code == 3, said.err
        assert f"stopped after step {at}" in said.err
    assert house.fluxrun("queue", spec).code == 0
    assert weights(house.folder / "runs" / "a") == weights(house.folder / "unbroken" / "a")
    newest = storage.read(max((house.folder / "runs" / "a" / "checkpoints").glob("*")))
    if kind == "fp16":
        assert newest.scalars["meters"]["scaler"]["scale"] > 0
        assert {tensor.dtype for tensor in newest.weights.lora.values()} == {torch.float32}
    if kind == "prodigy":
        assert newest.scalars["optimizer"]["shared"]["d"] > 1e-6
    if kind == "adamw8bit":
        assert any(tensor.dtype == torch.uint8 for tensor in newest.optimizer.values())


def test_a_run_that_ends_early_exports_its_best_step(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look every step, whose losses are given: the third is the best; two steps without a better one end it, in the
    phase before the last. Stopped on the way and resumed it ends the same."""
    from runner.training import objective

    losses = {1: 3.0, 2: 2.0, 3: 1.0, 4: 1.5, 5: 1.2, 6: 0.5}
    at: Iterator[int] = iter([])

    def given(self: Any) -> dict[float, float]:
        return {0.5: losses[next(at)]}

    monkeypatch.setattr(objective.FlowObjective, "evaluate", given)
    more = 'every = 50\n[stop]\nno_better_for = 2\n[export]\nbest = true\ndtype = "fp32"'
    spec = house.spec("a", every=more, steps="steps = 8", prompts="prompts = []\nevery = 1")
    at = iter(range(1, 9))
    said = house.fluxrun("queue", spec, "--runs", "unbroken")
    assert said.code == 0, said.err
    assert "a: training ends early: no eval loss below 1.00000 of step 3 for 2 steps (stop.no_better_for)\n" in said.err
    run = house.folder / "unbroken" / "a"
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["step"], state["best_step"], state["exported_step"]) == ("done", 5, 3, 3)
    best = storage.read(run / "checkpoints" / "step-000003.safetensors").weights.lora
    exported = load_file(run / "export" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(exported[f"transformer.{name}"], value) for name, value in best.items())
    assert house.fluxrun("queue", spec, "--runs", "unbroken").err.startswith("a: skipped, done")

    at = iter(range(1, 9))
    with stopping_after(4):
        assert house.fluxrun("queue", spec).code == 3
    at = iter(range(5, 9))
    assert house.fluxrun("queue", spec).code == 0
    assert export_bytes(house.folder / "runs" / "a") == export_bytes(run)


def test_a_base_without_guidance_embedding_trains(house: House) -> None:
    """FLUX.1-schnell's layout."""
    import shutil

    from diffusers import FluxTransformer2DModel

    base = house.folder / "schnell"
    shutil.copytree(BUILTIN["builtin:tiny"], base)
    model = FluxTransformer2DModel.from_pretrained(base / "transformer", guidance_embeds=False)
    assert not any("guidance" in name for name in model.state_dict())
    shutil.rmtree(base / "transformer")
    model.save_pretrained(base / "transformer")
    spec = house.spec("a", base='base = "schnell"', steps="steps = 2")
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    lora = load_file(house.folder / "runs" / "a" / "export" / "pytorch_lora_weights.safetensors")
    assert all(value.any() for name, value in lora.items() if ".lora_B." in name)  # which begin as zeros


def test_several_tokens_learn_side_by_side(house: House) -> None:
    """Also where one's name begins the other's; rows in the order of the spec, and the card says which is which."""
    for path in (house.folder / "pictures").glob("*.txt"):
        path.write_text(path.read_text().replace("TOK", "TOK beside a TOK2"))
    spec = house.spec(
        "a", name='name = "TOK2"\nvectors = 3\ninitializer = "red heart"\n[[tokens]]\nname = "TOK"', lr="lr = 0.3"
    )
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    export = house.folder / "runs" / "a" / "export"
    rows = load_file(export / "a_emb.safetensors")
    assert {key: tuple(value.shape) for key, value in rows.items()} == {
        "clip_l": (5, 64),
        "t5": (5, 96),
        "t5xxl": (5, 96),
    }
    assert torch.equal(rows["t5"], rows["t5xxl"])
    card = (export / "README.md").read_text()
    assert "- `<s0><s1><s2>` is what the training captions call TOK2" in card
    assert "- `<s3><s4>` is what the training captions call TOK" in card
    assert "trained as diffusers reads them" in card
    [job] = prepare_jobs([spec], house.folder / "runs", fetch=False, fresh=False)
    early = storage.read(house.folder / "runs" / "a" / "checkpoints" / "step-000002.safetensors").weights.rows
    for name in ("clip", "t5"):
        tokenizer, encoder = loading.load_tokenizer(BASE, name), loading.load_encoder(BASE, name)
        counts = [(len(one.entries), one.initializer) for one in job.plan.placeholders]
        first = token_rows.initial_rows(encoder, tokenizer, counts, 0, name)
        assert len({tuple(row) for row in first.tolist()}) == 5  # each begins as its own
        turned = torch.nn.functional.cosine_similarity(early[name], first)
        assert (turned < 0.99).all(), (
            turned
        )  # and has learned: the rescale and weight decay alone only change its length


def test_the_card_tells_which_consumers_the_rows_are_for(house: House) -> None:
    said = house.fluxrun("queue", house.spec("a", encoders='encoders = ["clip"]\npooling = "both"', steps="steps = 2"))
    assert said.code == 0, said.err
    card = (house.folder / "runs" / "a" / "export" / "README.md").read_text()
    assert "for diffusers and ComfyUI alike" in card
