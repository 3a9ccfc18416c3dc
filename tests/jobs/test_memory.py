"""The formulas of memory against what autograd really saves, real bases and the public's figures; what is told of
them."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.base import param_counts
from runner.base.files import BUILTIN
from runner.base.layers import FLUX1, linear_layers, lora_layers
from runner.base.param_counts import CLIP, T5, read_base_configs
from runner.core import hardware, humanize
from runner.jobs import activation_memory, card_fit, encoder_memory, memory, timing, timing_store
from runner.jobs.activation_memory import BatchShape, ByteWidths, TrainableLayers
from runner.jobs.prepare import prepare_jobs
from runner.plan.phases import Plan
from runner.preflight.base_files import check_base_files
from runner.spec.schema import Spec, dump
from tests.support.house import House
from tests.support.saved_tensors import encoder, transformer
from tests.support.setups import gpu

DEV = "black-forest-labs/FLUX.1-dev"
NARROW: dict[str, Any] = {  # of tools/bench/make_model.py
    "in_channels": 64, "num_layers": 3, "num_single_layers": 6, "attention_head_dim": 64, "num_attention_heads": 8,
    "joint_attention_dim": 512, "pooled_projection_dim": 128, "guidance_embeds": True, "axes_dims_rope": (8, 28, 28),
}  # fmt: skip
WIDE: dict[str, Any] = {**FLUX1, "num_layers": 2, "num_single_layers": 3, "guidance_embeds": True}


def planned(house: House, base: str = DEV, more: str = "", **changes: str) -> tuple[Spec, Plan]:
    path = house.spec(base=f'base = "{base}"', **changes)
    path.write_text(path.read_text() + more)
    [job] = prepare_jobs([path], house.folder / "runs", fetch=False, fresh=False)
    return job.spec, job.plan


def phases_of(spec: Spec, plan: Plan, *, on_gpu: bool = True) -> dict[str, memory.Memory]:
    configs = read_base_configs(spec.model.base)
    assert configs is not None
    return memory.estimate(spec, plan, configs, on_gpu=on_gpu)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_parts_have_as_many_parameters_as_their_files() -> None:
    configs = read_base_configs("builtin:tiny")
    assert configs is not None
    told, counted = check_base_files(BUILTIN["builtin:tiny"], None)
    assert not told
    assert {part: sum(numbers) for part, numbers in configs.parameters.items()} == counted


def test_flux_has_as_many_parameters_as_its_published_files() -> None:
    configs = read_base_configs(DEV)
    assert configs is not None
    found = {part: sum(numbers) for part, numbers in configs.parameters.items()}
    assert found == {**param_counts.FLUX1_PARTS, "transformer": 11_901_408_320}
    assert read_base_configs("some/model") is None


# ---- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["attention", "attention+mlp", "all"])
@pytest.mark.parametrize(
    ("config", "dtype", "images", "img", "txt", "rank"),
    [
        (NARROW, torch.float32, 1, 64, 64, 4),
        pytest.param(NARROW, torch.float32, 2, 256, 128, 16, marks=pytest.mark.slow),
        pytest.param(NARROW, torch.float32, 4, 1024, 128, 16, marks=pytest.mark.slow),
        (WIDE, torch.bfloat16, 1, 4096, 512, 16),
        (WIDE, torch.bfloat16, 2, 1024, 256, 4),
    ],
    ids=["128 px", "256 px x 2", "512 px x 4", "1024 px, bf16", "512 px x 2, bf16"],
)
def test_the_transformer_saves_what_the_formula_says(
    config: dict[str, Any], dtype: torch.dtype, images: int, img: int, txt: int, rank: int, layers: str
) -> None:
    chosen = lora_layers(linear_layers(config), layers)
    width = ByteWidths(4, 4) if dtype == torch.float32 else ByteWidths(2, 4)
    kinds_of_blocks = (
        (False, False),  # diffusers'
        (True, False),  # recomputing
        (True, True),  # recomputing their projections as well
    )
    for pooled, states, (recompute, selective) in itertools.product((False, True), (False, True), kinds_of_blocks):
        trained = TrainableLayers(chosen, rank, False, pooled, states)
        batch = BatchShape(images, img, txt)
        estimated = activation_memory.transformer_saved(
            config, batch, width, trained, (), recompute=recompute, selective=selective
        )
        real = transformer(
            config, list(chosen), rank, dtype, images, img, txt, pooled=pooled, states=states, spared=recompute,
            again=selective,
        )  # fmt: skip
        assert estimated == pytest.approx(real, rel=0.02), (pooled, states, recompute, selective)


def test_nothing_is_saved_before_the_first_trained_layer() -> None:
    last = {"single_transformer_blocks.5.attn.to_q": (512, 512)}
    batch, width = BatchShape(1, 256, 128), ByteWidths(4, 4)
    estimated = activation_memory.transformer_saved(
        NARROW, batch, width, TrainableLayers(last, 4, False, False, False), (), recompute=False
    )
    real = transformer(NARROW, list(last), 4, torch.float32, 1, 256, 128, pooled=False, states=False)
    of_all_layers = activation_memory.transformer_saved(
        NARROW, batch, width, TrainableLayers(lora_layers(linear_layers(NARROW), "attention"), 4, False, False, False), (),
        recompute=False,
    )  # fmt: skip
    assert estimated == pytest.approx(real, rel=0.05)
    assert estimated < of_all_layers / 5


def test_checkpointing_keeps_the_blocks_inputs_and_one_block() -> None:
    chosen = lora_layers(linear_layers(FLUX1), "attention")
    trained = TrainableLayers(chosen, 16, False, False, False)
    batch, width = BatchShape(1, 4096, 512), ByteWidths(2, 4)
    whole = activation_memory.transformer_saved(FLUX1, batch, width, trained, (), recompute=False)
    checkpointed = activation_memory.transformer_saved(FLUX1, batch, width, trained, range(56), recompute=False)
    inputs = 57 * 4608 * 3072 * 2
    assert inputs + whole / 60 < checkpointed < inputs + whole / 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoders_save_what_the_formulas_say(dtype: torch.dtype) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    narrow = 4 if dtype == torch.float32 else 2
    t5 = {**T5, "num_layers": 3}
    for selective in (False, True):
        t5_config = T5Config(**t5, feed_forward_proj="gated-gelu", dropout_rate=0.1)
        real = encoder(T5EncoderModel, t5_config, dtype, 2, 256, again=selective)
        assert encoder_memory.t5_saved(t5, 2, 256, narrow, selective=selective) == pytest.approx(real, rel=0.05)
    real = encoder(CLIPTextModel, CLIPTextConfig(**CLIP), dtype, 2, 77)
    assert encoder_memory.clip_saved(CLIP, 2, narrow, 0) == pytest.approx(real, rel=0.1)


# ---- phases ----------------------------------------------------------------------------------------------------------

BIG = {
    "resolution": "resolution = 1024",
    "max_sequence_length": "max_sequence_length = 512",
    "batch_size": "batch_size = 1",
}
CLIP_ONLY = {**BIG, "encoders": 'encoders = ["clip"]'}


CHECKPOINTING = {"max_sequence_length": "max_sequence_length = 512\ngradient_checkpointing = true"}
EIGHT_BIT = '[optimizer]\nname = "adamw8bit"\n'


def gib(house: House, phase: str = "lora", more: str = "", quantize: str = "none", **changes: str) -> float:
    """Of a card, margin included."""
    spec, plan = planned(house, more=more, **{**CLIP_ONLY, **changes})
    found = phases_of(memory.with_values(spec, {"model": {"quantize": quantize}}), plan)
    return memory.needs(found[phase]) / 2**30


def test_the_publics_figures_for_flux_are_met(house: House) -> None:
    """Of other trainers' code, so near and no nearer. All with checkpointing, one picture, encoders gone.

    huggingface.co/blog/flux-qlora (June 2025): LoRA of rank 4 at 512 px takes 26 GB in bf16, 9 GB in nf4. SimpleTuner's
    documentation/quickstart/FLUX.md: rank 16 on all layers takes "a bit more than" 30 GB, 18 GB in int8. kohya-ss'
    flux-hasui-lora (huggingface.co/kohya-ss/misc-models): rank 4 on all layers, 1024 px, bf16 takes more than 26 GB.
    """
    small = {**CHECKPOINTING, "resolution": "resolution = 512"}
    every = {**CHECKPOINTING, "rank": 'rank = 16\nlayers = "all"'}
    gb = 1e9 / 2**30
    assert gib(house, more=EIGHT_BIT, **small) == pytest.approx(26 * gb, rel=0.1)
    assert gib(house, more=EIGHT_BIT, quantize="nf4", **small) == pytest.approx(9 * gb, rel=0.1)
    assert gib(house, **every) == pytest.approx(30 * gb, rel=0.1)
    assert gib(house, quantize="int8", **every) == pytest.approx(18 * gb, rel=0.1)
    assert 26 * gb < gib(house, more=EIGHT_BIT, **CHECKPOINTING, rank='rank = 4\nlayers = "all"') < 30 * gb
    # without checkpointing no 40 GB card has it, if blocks keep what diffusers' keep
    assert 38 < gib(house) < 41 < 50 < gib(house, max_sequence_length="max_sequence_length = 512\ncompile = true") < 60


def test_each_setting_costs_what_it_should(house: House) -> None:
    usual = gib(house)
    assert gib(house, batch_size="batch_size = 2") > usual + 10
    assert gib(house, resolution="resolution = 512") < usual - 10
    assert gib(house, rank="rank = 128") > usual + 0.5
    assert gib(house, rank='rank = 4\nlayers = "all"') > usual + 2
    assert gib(house, more=EIGHT_BIT) < usual
    assert gib(house, more='[prior]\nimages = "classes"\nprompt = "a heart"\n') > usual + 10
    assert gib(house, phase="joint") > usual + 2  # the modulation's way back
    assert gib(house, phase="joint", encoders='encoders = ["clip", "t5"]') > gib(house, phase="joint") + 8.9


def test_a_text_of_several_pictures_is_kept_once(house: House) -> None:
    spec, plan = planned(house, **BIG | {"batch_size": "batch_size = 4"})
    found = {}
    for texts in (None, 9, 4, 3, 1):
        phases = phases_of(spec, replace(plan, distinct_texts=texts))
        found[texts] = phases["joint"].activations
    assert found[None] == found[9] == found[4]
    one = encoder_memory.t5_saved(T5, 1, 512, 2)
    assert found[4] - found[3] == pytest.approx(one, rel=0.03)
    assert found[4] - found[1] == pytest.approx(3 * one, rel=0.03)


def test_pictures_while_training_bring_the_vae(house: House) -> None:
    spec, plan = planned(house, **CLIP_ONLY)
    spec = memory.with_values(
        spec, {"model": {"gradient_checkpointing": True}, "validation": {"size": 2048, "every": 2}}
    )
    found, without = (
        phases_of(spec, plan),
        phases_of(memory.with_values(spec, {"validation": {"every": None}}), plan),
    )
    assert found["lora"].activations > without["lora"].activations + 2**32


def test_the_largest_bucket_counts(house: House) -> None:
    from PIL import Image

    for index in range(2):
        Image.new("RGB", (900, 400)).save(house.folder / "pictures" / f"wide{index}.png")
        (house.folder / "pictures" / f"wide{index}.txt").write_text("a TOK")
    square = planned(house, "builtin:tiny", resolution="resolution = 128")
    wide = planned(house, "builtin:tiny", resolution="resolution = [64, 128]\nbuckets = true")
    assert max(width * height for width, height in wide[1].sizes or {}) > 128 * 128
    small, large = (phases_of(*one, on_gpu=False) for one in (square, wide))
    assert large["lora"].activations > small["lora"].activations


# ---- as it is told ---------------------------------------------------------------------------------------------------


def test_the_plan_tells_cards_and_the_cheapest_way_to_a_smaller_one(house: House) -> None:
    path = house.spec(base=f'base = "{DEV}"', **{**CLIP_ONLY, "batch_size": "batch_size = 4"})
    [run] = json.loads(house.fluxrun("plan", path, "--json").out)["runs"]
    for phase in run["phases"]:
        parts = {key: value for key, value in phase["memory"].items() if key != "total"}
        assert parts.keys() == {"weights", "adapters", "gradients", "optimizer", "activations", "workspace"}
        assert sum(parts.values()) == phase["memory"]["total"]
    fits = run["fits"]
    assert (fits["phase"], fits["cards"]) == ("joint", [])
    assert [one["set"] for one in fits["changes"]] == [
        ["train.batch_size = 1, train.accumulate = 4"],
        ["train.batch_size = 1, train.accumulate = 4", 'model.gradient_checkpointing = "selective"'],
        [
            "train.batch_size = 1, train.accumulate = 4",
            "model.gradient_checkpointing = true",
            'model.quantize = "int8"',
        ],
        ["train.batch_size = 1, train.accumulate = 4", "model.gradient_checkpointing = true", 'model.quantize = "nf4"'],
        [
            "train.batch_size = 1, train.accumulate = 4",
            "model.gradient_checkpointing = true",
            'model.quantize = "nf4"',
            'model.offload = "blocks"',
        ],
    ]
    assert [one["cards"][0] for one in fits["changes"]] == [80, 40, 16, 12, 8]
    needs = [fits["needs_bytes"], *(one["needs_bytes"] for one in fits["changes"])]
    assert needs == sorted(needs, reverse=True)
    words = house.fluxrun("plan", path).out
    assert "  memory: about encode 9.1 GiB, joint 91.6 GiB, encode-learned " in words
    assert "fits no card of up to 80 GB (9" in words
    assert "; with train.batch_size = 1, train.accumulate = 4: 80 GB (" in words


def test_recomputing_while_rows_learn_is_told_for_what_it_saves(house: House) -> None:
    """T5 beside the transformer makes the joint phase the largest; what is told of the key is what it then needs."""
    path = house.spec(base=f'base = "{DEV}"', **{**BIG, "resolution": "resolution = 512"})
    [before] = json.loads(house.fluxrun("plan", path, "--json").out)["runs"]
    path.write_text(path.read_text().replace('"t5"]', '"t5"]\ngradient_checkpointing = "selective"'))
    [after] = json.loads(house.fluxrun("plan", path, "--json").out)["runs"]
    first = before["fits"]["changes"][0]
    assert (before["fits"]["cards"], first["set"]) == ([80], ['inversion.gradient_checkpointing = "selective"'])
    assert (first["cards"], first["needs_bytes"]) == ([40, 80], after["fits"]["needs_bytes"])
    found = [{phase["name"]: phase["memory"]["activations"] for phase in run["phases"]} for run in (before, after)]
    assert found[1]["joint"] < found[0]["joint"] / 2
    assert found[1]["lora"] == found[0]["lora"]
    assert not any("inversion.gradient" in key for one in before["fits"]["changes"][1:] for key in one["set"])


def test_a_base_nobody_knows_has_no_estimate(house: House) -> None:
    path = house.spec(base='base = "some/model"')
    [run] = json.loads(house.fluxrun("plan", path, "--json").out)["runs"]
    assert {phase["memory"] for phase in run["phases"]} == {None}
    assert run["fits"] is None
    assert f"  {card_fit.UNKNOWN}" in house.fluxrun("plan", path).out.splitlines()


def test_on_the_cpu_it_is_the_process_that_is_meant(house: House) -> None:
    on_gpu, on_cpu = (
        json.loads(house.fluxrun("plan", house.spec(), "--json", *more).out)["runs"][0]
        for more in ((), ("--gpus", "cpu"))
    )
    assert on_cpu["fits"] is None
    weights = [run["phases"][1]["memory"]["weights"] for run in (on_gpu, on_cpu)]
    assert weights[1] == 2 * weights[0]  # bf16, fp32


def test_a_run_tells_what_it_took_beside_what_was_there(done: House) -> None:
    state = json.loads((done.folder / "runs" / "a" / "state.json").read_text())
    before = state["memory_before_models"]
    assert 50 << 20 < before < min(one["peak_memory_bytes"] for one in state["phases"].values())


# ---- check -----------------------------------------------------------------------------------------------------------


def told(
    house: House, monkeypatch: pytest.MonkeyPatch, free: int, card: int = 24000, **changes: str
) -> list[dict[str, Any]]:
    path = gpu(f"0, GPU-a, Test Card, {card}, {free}, 8.6", **changes)(house, monkeypatch)
    found = json.loads(house.fluxrun("check", path, "--json").out)["findings"]
    return [one for one in found if "phase" in one["message"]]


def test_too_little_for_the_weights_is_an_error(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    [one] = told(house, monkeypatch, 3)
    assert one["level"] == "error"
    assert "needs at least 6 MiB for its weights" in one["message"]


def test_too_little_for_the_estimate_is_a_warning_with_a_way_out(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    [one] = told(house, monkeypatch, 20)
    assert one["level"] == "warning"
    assert one["message"].startswith(
        "phase export needs about 845 MiB, margin included, and GPU 0 (Test Card) has 20 MiB of "
    )
    assert (
        "; end what holds its memory (`nvidia-smi` names it); `fluxrun check SPEC --step` measures it" in one["message"]
    )


def test_a_change_that_suffices_is_named(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"batch_size": "batch_size = 64", "resolution": "resolution = 512"}
    spec, plan = planned(house, "builtin:tiny", **changes)
    configs = read_base_configs("builtin:tiny")
    assert configs is not None
    first = next(card_fit.memory_savings(spec, plan, configs))
    free = first.needs // 2**20 + 1
    [one] = told(house, monkeypatch, free, card=free + 100, **changes)
    assert (
        f"set train.batch_size = 1, train.accumulate = 64 ({humanize.format_bytes(first.needs)}); `fluxrun"
        in one["message"]
    )


def test_enough_is_not_worth_a_word(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(house, monkeypatch, 23000) == []


# ---- the timing store ------------------------------------------------------------------------------------------------


def test_a_new_runs_folder_knows_what_this_machine_took(house: House) -> None:
    assert house.fluxrun("queue", house.spec("a"), "--gpus", "cpu").code == 0
    assert timing_store.store_path() == Path(os.environ["XDG_CACHE_HOME"]) / "fluxrun" / "pace.json"
    elsewhere = house.folder / "other-runs"
    path, larger = house.spec("b"), house.spec("c", batch_size="batch_size = 4")
    once, twice = (
        json.loads(house.fluxrun("plan", one, "--json", "--gpus", "cpu", "--runs", elsewhere).out)["runs"][0]["time"]
        for one in (path, larger)
    )
    assert once["s_per_step"] > 0
    assert not once["about"]
    assert twice["s_per_step"] == pytest.approx(2 * once["s_per_step"])
    assert twice["about"]


def test_check_step_is_remembered(house: House) -> None:
    path = house.spec()
    assert house.fluxrun("check", path, "--step", "--gpus", "cpu").code == 0
    [job] = prepare_jobs([path], house.folder / "runs", fetch=False, fresh=False)
    [own] = timing.estimate_times([job], house.folder / "runs", on_gpu=False)
    assert own.s_per_step
    assert own.peak
    [own] = timing.estimate_times([job], house.folder / "runs", on_gpu=True)  # another device
    assert own.s_per_step is None


def test_several_resolutions_take_turns(house: House) -> None:
    for side, seconds in ((64, 1.0), (128, 4.0)):
        [job] = prepare_jobs(
            [house.spec("a", resolution=f"resolution = {side}")], house.folder / "runs", fetch=False, fresh=False
        )
        tables = dump(job.spec)
        device, base = hardware.device_name(on_gpu=False), timing_store.base_name("builtin:tiny")
        timing_store.store(
            {timing.stored_key(device, base, tables, side): {"images": 2, "s_per_step": seconds, "beside": 1.0}}
        )
    jobs = prepare_jobs(
        [house.spec("b", resolution="resolution = [64, 128]")], house.folder / "runs", fetch=False, fresh=False
    )
    [own] = timing.estimate_times(jobs, house.folder / "runs", on_gpu=False)
    assert own.s_per_step == 2.5


@pytest.mark.parametrize("content", ["{", '{"format": 1, "entries": {"x": [{"images": 1}]}}', '{"format": 9}', "[]"])
def test_a_book_that_is_none_is_done_without(house: House, content: str) -> None:
    timing_store.store_path().parent.mkdir(parents=True)
    timing_store.store_path().write_text(content)
    assert not any(timing_store.read_entries().values())
    timing_store.store({"key": {"images": 1, "s_per_step": 1.0, "beside": 0.0}})
    assert timing_store.read_entries()["key"][0]["s_per_step"] == 1.0


def test_a_folder_that_cannot_be_written_is_no_fault(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(house.write("a-file", "")))
    timing_store.store({"key": {"images": 1, "s_per_step": 1.0, "beside": 0.0}})
    assert timing_store.read_entries() == {}
