"""LoRA files as other trainers write them: what can be carried over is, exactly; what cannot is named for what it
is."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save
from torch import Tensor

from runner.core.errors import BadFileError
from runner.export import convert
from runner.export.lora_layouts import Adapter
from tests.support.adapters import CONFIG, differs
from tests.support.house import House
from tests.support.readers import comfyui_changes, comfyui_direct_changes

D = CONFIG["attention_head_dim"] * CONFIG["num_attention_heads"]
RANK = 4


def save_file(tensors: dict[str, Tensor], file: Path) -> None:
    save({key: value.clone() for key, value in tensors.items()}, file)  # the library refuses shared memory


def pair(rows: int, width: int = D, seed: int = 0) -> tuple[Tensor, Tensor]:
    """down, up"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, width, generator=generator) * 0.02, torch.randn(rows, RANK, generator=generator) * 0.02


def named(
    key: str, ends: tuple[str, str], factors: tuple[Tensor, Tensor], alpha: float | None = None
) -> dict[str, Tensor]:
    more = {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
    return {f"{key}{end}": value for end, value in zip(ends, factors, strict=True)} | more


KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
XFLUX = (".down.weight", ".up.weight")
Q, QKV, OUT, LAST = pair(D), pair(3 * D, seed=1), pair(D, 5 * D, seed=2), pair(D, seed=3)
BLOCK, SINGLE = "transformer_blocks.1.attn", "single_transformer_blocks.2"
ATTENTION = [f"{BLOCK}.{name}" for name in ("to_q", "to_k", "to_v")]
CONTEXT = [f"{BLOCK}.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
OF_SINGLE = [f"{SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")]
# layout -> (the file, the change of every layer of it: modules, factors, scale)
LAYOUTS: dict[str, tuple[dict[str, Tensor], list[tuple[list[str], tuple[Tensor, Tensor], float]]]] = {
    "OneTrainer": (
        {
            **named("lora_transformer_transformer_blocks_1_attn_to_q", KOHYA, Q, 2.0),
            **named("lora_transformer_single_transformer_blocks_2_proj_out", KOHYA, OUT, 1.0),
            **named("lora_transformer_proj_out", KOHYA, pair(64), 4.0),
            **named("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", KOHYA, pair(64, 64), 2.0),
        },
        [([ATTENTION[0]], Q, 0.5), ([f"{SINGLE}.proj_out"], OUT, 0.25), (["proj_out"], pair(64), 1.0),
         (["text_encoder.encoder.layers.0.self_attn.q_proj"], pair(64, 64), 0.5)],
    ),
    "BFL, bias of zeros": (
        {
            **named("double_blocks.1.img_attn.qkv", PEFT, QKV), "double_blocks.1.img_attn.qkv.lora_B.bias": torch.zeros(3 * D),
            **named("single_blocks.2.linear2", PEFT, OUT), **named("final_layer.linear", PEFT, pair(64)),
        },
        [(ATTENTION, QKV, 1.0), ([f"{SINGLE}.proj_out"], OUT, 1.0), (["proj_out"], pair(64), 1.0)],
    ),
    "x-flux": (
        {
            **named("double_blocks.1.processor.qkv_lora1", XFLUX, QKV), **named("double_blocks.1.processor.qkv_lora2", XFLUX, QKV),
            **named("double_blocks.1.processor.proj_lora2", XFLUX, LAST),
            **named("single_blocks.2.processor.qkv_lora", XFLUX, QKV), **named("single_blocks.2.processor.proj_lora", XFLUX, OUT),
        },
        [(ATTENTION, QKV, 1.0), (CONTEXT, QKV, 1.0), ([f"{BLOCK}.to_add_out"], LAST, 1.0), (OF_SINGLE, QKV, 1.0),
         ([f"{SINGLE}.proj_out"], OUT, 1.0)],
    ),
    "ai-toolkit": ({**named(f"transformer.{ATTENTION[0]}", PEFT, Q)}, [([ATTENTION[0]], Q, 1.0)]),
    "diffusers without a prefix": ({**named(ATTENTION[0], PEFT, Q)}, [([ATTENTION[0]], Q, 1.0)]),
    "peft's adapter name": (
        {**named(f"base_model.model.{ATTENTION[0]}", (".lora_A.default.weight", ".lora_B.default.weight"), Q)},
        [([ATTENTION[0]], Q, 1.0)],
    ),
    "fal's Kontext": ({**named("base_model.model.double_blocks.1.img_attn.qkv", PEFT, QKV)}, [(ATTENTION, QKV, 1.0)]),
    "ComfyUI's own": (
        {
            **named("diffusion_model.double_blocks.1.img_attn.qkv", KOHYA, QKV, 8.0),
            **named("text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj", KOHYA, pair(64, 64)),
        },
        [(ATTENTION, QKV, 2.0), (["text_encoder.encoder.layers.0.self_attn.q_proj"], pair(64, 64), 1.0)],
    ),
    "LyCORIS, plain": ({**named("lycoris_double_blocks_1_img_attn_proj", KOHYA, LAST, 1.0)}, [([f"{BLOCK}.to_out.0"], LAST, 0.25)]),
    "sd-scripts": ({**named("lora_unet_double_blocks_1_img_attn_qkv", KOHYA, QKV, 2.0)}, [(ATTENTION, QKV, 0.5)]),
}  # fmt: skip


def wanted(layers: list[tuple[list[str], tuple[Tensor, Tensor], float]]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for modules, (down, up), scale in layers:
        parts = torch.chunk(scale * (up @ down), len(modules))
        out |= dict(zip(modules, parts, strict=True))
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_from_elsewhere_is_carried_over_exactly(layout: str, house: House) -> None:
    tensors, layers = LAYOUTS[layout]
    save_file(tensors, house.folder / "theirs.safetensors")
    for to in ("kohya", "diffusers"):
        said = house.fluxrun("convert", "theirs.safetensors", "--to", to)
        assert said.code == 0, said.err
        found = load_file(house.folder / f"theirs.{to}.safetensors")
        changes = comfyui_changes(found, CONFIG) if to == "kohya" else comfyui_direct_changes(found)
        assert differs(changes, wanted(layers)) < 1e-8
        bias = "double_blocks.1.img_attn.qkv.lora_B.bias"
        assert (f"left out: zeros, which change nothing (1 key: {bias})" in said.err) == (bias in tensors)


KEY = "lora_unet_double_blocks_0_img_attn_proj"
T5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
ONES = torch.ones(8, RANK)
OTHERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "dora": (
        {**named(KEY, KOHYA, pair(D), 2.0), f"{KEY}.dora_scale": torch.ones(D, 1)},
        f"DoRA, whose magnitudes go with the base's weights: no LoRA can hold them (1 key: {KEY}.dora_scale)",
    ),
    "lokr": (
        {"lycoris_x.lokr_w1": ONES, "lycoris_x.lokr_w2": ONES, "lycoris_x.alpha": torch.tensor(1.0)},
        "LoKr, a Kronecker product, which cannot be written as a LoRA of its rank (2 keys: lycoris_x.lokr_w1, "
        "lycoris_x.lokr_w2)",
    ),
    "loha": (
        {f"{KEY}.hada_w1_a": ONES, f"{KEY}.hada_w1_b": ONES, f"{KEY}.hada_w2_a": ONES, f"{KEY}.hada_w2_b": ONES},
        "LoHa, a Hadamard product, which cannot be written as a LoRA of its rank (4 keys: "
        f"{KEY}.hada_w1_a, {KEY}.hada_w1_b, {KEY}.hada_w2_a and 1 more)",
    ),
    "sdxl": (
        named("lora_unet_input_blocks_4_1_proj_in", KOHYA, pair(8)),
        "an SDXL LoRA (2 keys: lora_unet_input_blocks_4_1_proj_in.lora_down.weight, "
        "lora_unet_input_blocks_4_1_proj_in.lora_up.weight)",
    ),
    "sdxl with clip": (
        named("lora_te2_text_model_encoder_layers_0_mlp_fc1", KOHYA, pair(8)),
        "an SDXL LoRA (2 keys: lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight, "
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight)",
    ),
    "sd1": (
        named("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", PEFT, pair(8)),
        "a LoRA of Stable Diffusion 1, 2 or XL (2 keys: ",
    ),
    "sd3": (named("diffusion_model.joint_blocks.0.x_block.attn.qkv", PEFT, pair(8)), "an SD3 LoRA (2 keys: "),
    "sd3, with FLUX.1's names": (
        named("transformer.transformer_blocks.0.attn.to_q", PEFT, pair(1536, 1536)), "an SD3 LoRA (2 keys: "
    ),
    "wan": (named("diffusion_model.blocks.0.self_attn.q", PEFT, pair(8)), "a Wan LoRA (2 keys: "),
    "wan, kohya": (named("lora_unet_blocks_0_cross_attn_k", KOHYA, pair(8)), "a Wan LoRA (2 keys: "),
    "qwen": (
        {**named("transformer.transformer_blocks.0.attn.to_q", PEFT, Q),
         **named("transformer.transformer_blocks.0.img_mlp.net.2", PEFT, pair(8))},
        "a Qwen-Image LoRA (2 keys: ",
    ),
    "more blocks than FLUX.1": (
        named("transformer_blocks.59.attn.to_q", PEFT, Q),
        "a LoRA of another model (transformer_blocks.59; FLUX.1 has 19 of these) (2 keys: ",
    ),
    "a layer that there is not": (
        named("transformer.transformer_blocks.0.attn.to_x", PEFT, Q),
        "no layer of FLUX.1 (2 keys: transformer.transformer_blocks.0.attn.to_x.lora_A.weight, "
        "transformer.transformer_blocks.0.attn.to_x.lora_B.weight)",
    ),
    "half of a pair": (
        {f"transformer.{ATTENTION[0]}.lora_A.weight": Q[0], **named(f"transformer.{ATTENTION[1]}", PEFT, Q)},
        f"half of a pair, whose other half is missing (1 key: transformer.{ATTENTION[0]}.lora_A.weight)",
    ),
    "the other half, of CLIP": (
        {**named(KEY, KOHYA, LAST), "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": Q[1]},
        "half of a pair, whose other half is missing (1 key: lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight)",
    ),
    "two ranks": (
        named(f"transformer.{ATTENTION[0]}", PEFT, (Q[0], torch.ones(D, 8))),
        f"a pair whose ranks do not match, 4 and 8 (2 keys: transformer.{ATTENTION[0]}.lora_A.weight, "
        f"transformer.{ATTENTION[0]}.lora_B.weight)",
    ),
    "a convolution": (
        named(f"transformer.{ATTENTION[0]}", PEFT, (Q[0][..., None, None], Q[1][..., None, None])),
        "a pair that is not of two matrices (2 keys: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_lora_of_flux_is_named(case: str, house: House) -> None:
    tensors, told = OTHERS[case]
    save_file(tensors, house.folder / "x.safetensors")
    for to in ("kohya", "diffusers"):
        said = house.fluxrun("convert", "x.safetensors", "--to", to, "--leave-out")
        assert said.code == 1
        assert said.err.startswith(f"fluxrun: x.safetensors: {told}")
        assert said.err.endswith("; wanted is a LoRA of FLUX.1\n")
        assert left_in(house.folder) == {"x.safetensors"}


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_what_stands_beside_a_lora_is_left_out_only_when_asked(house: House) -> None:
    beside = {
        **named(T5, KOHYA, pair(8)),
        f"{KEY}.diff_b": torch.ones(D),
        "lora_unet_double_blocks_0_img_attn_norm_key_norm.w_norm": torch.ones(8),
    }
    save_file({**named(KEY, KOHYA, LAST, 2.0), **beside}, house.folder / "x.safetensors")
    told = (
        f"a T5 LoRA, which diffusers does not read and fluxrun does not convert (2 keys: {T5}.lora_down.weight, "
        f"{T5}.lora_up.weight)",
        f"a bias, which LoRA files of the kohya layout do not have (1 key: {KEY}.diff_b)",
        "a norm's weights, which LoRA files of neither layout have (1 key: "
        "lora_unet_double_blocks_0_img_attn_norm_key_norm.w_norm)",
    )
    said = house.fluxrun("convert", "x.safetensors", "--to", "diffusers")
    assert said.code == 1
    assert all(one in said.err for one in told)
    assert said.err.endswith("; nothing was written: --leave-out converts the rest without it\n")
    assert left_in(house.folder) == {"x.safetensors"}
    said = house.fluxrun("convert", "x.safetensors", "--to", "diffusers", "--leave-out")
    assert said.code == 0
    assert "x.diffusers.safetensors: left out: " in said.err
    assert all(one in said.err for one in told)
    found = comfyui_direct_changes(load_file(house.folder / "x.diffusers.safetensors"))
    assert differs(found, wanted([(["transformer_blocks.0.attn.to_out.0"], LAST, 0.5)])) < 1e-8
    save_file(beside, house.folder / "x.safetensors")
    said = house.fluxrun("convert", "x.safetensors", "--to", "kohya", "--leave-out")
    assert said.code == 1
    assert "there is no LoRA in it that changes FLUX.1's transformer or CLIP; wanted is one" in said.err


@pytest.mark.parametrize("key", [KEY, "lora_te1_text_model_encoder_layers_0_mlp_fc1"])
def test_an_alpha_of_zero_is_named(key: str, house: House) -> None:
    save_file(named(key, KOHYA, pair(D), 0.0), house.folder / "x.safetensors")
    for to in ("kohya", "diffusers"):
        said = house.fluxrun("convert", "x.safetensors", "--to", to)
        assert (said.code, said.err) == (
            1,
            f"fluxrun: x.safetensors: {key}: its alpha is 0, which sd-scripts takes as the rank (4) and other programs as no "
            "change at all; write the alpha that is meant into the file, or take the layer out\n",
        )
    assert left_in(house.folder) == {"x.safetensors"}


def test_two_adapters_of_one_layer_are_not_mixed(house: House) -> None:
    two = {
        **named(f"transformer.{ATTENTION[0]}", PEFT, Q),
        **named("lora_unet_double_blocks_1_img_attn_qkv", KOHYA, QKV),
    }
    save_file(two, house.folder / "x.safetensors")
    said = house.fluxrun("convert", "x.safetensors", "--to", "kohya")
    assert said.code == 1
    assert f"another key is an adapter of {ATTENTION[0]} too; one file holds one LoRA" in said.err


# ---- a failed output never has its final name ------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "infinite values")])
def test_values_that_are_no_numbers_are_named_and_leave_no_file(house: House, value: float, what: str) -> None:
    key = f"transformer.{ATTENTION[0]}"
    down, up = pair(D)
    up[3, 1] = value
    save_file(named(key, PEFT, (down, up)), house.folder / "pytorch_lora_weights.safetensors")
    for to in ("kohya", "diffusers"):
        said = house.fluxrun("convert", "pytorch_lora_weights.safetensors", "--to", to)
        assert said.code == 1
        assert said.err == (
            f"fluxrun: pytorch_lora_weights.safetensors: {what} in {key}.lora_B.weight, 1 of {up.numel()}; a LoRA with such "
            "values draws nothing, so use an earlier step's\n"
        )
    assert left_in(house.folder) == {"pytorch_lora_weights.safetensors"}


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_file_that_does_not_read_back_is_not_left_there(
    house: House, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(named(f"transformer.{ATTENTION[0]}", PEFT, Q), house.folder / "x.safetensors")
    real: Callable[[Adapter], dict[str, Tensor]] = getattr(convert, f"to_{to}")

    def damaged(adapter: Adapter) -> dict[str, Tensor]:
        return {key: value * 1.1 for key, value in real(adapter).items()}

    monkeypatch.setattr(convert, f"to_{to}", damaged)
    said = house.fluxrun("convert", "x.safetensors", "--to", to, "--out", "new.safetensors")
    assert said.code == 1
    assert "new.safetensors: transformer_blocks.1.attn.to_q changes its layer otherwise than was trained" in said.err
    assert left_in(house.folder) == {"x.safetensors"}


@pytest.mark.parametrize("name", ["x.kohya.safetensors", "made.safetensors"])
def test_a_file_that_exists_is_not_replaced(house: House, name: str) -> None:
    """Neither by the default name nor by --out; it is told before the LoRA is read."""
    (house.folder / "x.safetensors").write_text("no LoRA")
    (house.folder / name).write_text("mine")
    out = () if name == "x.kohya.safetensors" else ("--out", name)
    said = house.fluxrun("convert", "x.safetensors", "--to", "kohya", *out)
    assert (said.code, said.err) == (1, f"fluxrun: {name} exists; name another with --out, or move it away\n")
    assert (house.folder / name).read_text() == "mine"


def test_a_converted_file_is_named_as_what_it_is(house: House) -> None:
    save_file(named(f"transformer.{ATTENTION[0]}", PEFT, Q), house.folder / "x.safetensors")
    os.mkfifo(house.folder / "pipe")
    for out in ("victim.toml", "pipe"):
        said = house.fluxrun("convert", "x.safetensors", "--to", "kohya", "--out", out)
        told = f"--out {out}: the new file is a safetensors file; name one that ends in .safetensors"
        assert (said.code, said.err) == (1, f"fluxrun: {told}\n")
    assert left_in(house.folder) == {"x.safetensors"}
    assert (house.folder / "pipe").is_fifo()


def test_an_output_that_cannot_be_written_is_one_line(done: House, tmp_path: Path) -> None:
    """Of every command with an output that is named: one line, nothing written."""
    (tmp_path / "file").write_text("in the way")
    save_file(named(f"transformer.{ATTENTION[0]}", PEFT, Q), tmp_path / "x.safetensors")
    out = tmp_path / "file" / "out.safetensors"
    command: tuple[str | Path, ...]
    for command in (
        ("convert", tmp_path / "x.safetensors", "--to", "kohya", "--out", out),
        ("schema", "--out", out),
        ("new", out),
        ("sample", "a", "--out", out),
    ):
        said = done.fluxrun(*command)
        assert said.code == 1
        place = out / "sample-sheet.png" if command[0] == "sample" else out
        assert re.fullmatch(rf"fluxrun: {re.escape(str(place))}: cannot be written \(.*\); name another\n", said.err), (
            command
        )
    assert (tmp_path / "file").read_text() == "in the way"
    for name in ("a", "b"):
        shutil.copytree(done.folder / "runs" / "a", tmp_path / "runs" / name)
    for command, name in (  # where root may write by its rights, and no file can be created
        (("convert", tmp_path / "x.safetensors", "--to", "kohya", "--out"), "x.safetensors"),
        (("schema", "--out"), "x.json"),
        (("new",), "x.toml"),
        (("compare", "a", "b", "--runs", tmp_path / "runs", "--out"), "x.png"),
        (("sample", "a", "--out"), ""),
    ):
        said = done.fluxrun(*command, Path("/proc", name))
        told = f"/proc/{name or 'sample-sheet.png'}: cannot be written (/proc: No such file or directory); name another"
        assert (said.code, said.err) == (1, f"fluxrun: {told}\n"), command
    os.mkfifo(tmp_path / "pipe")
    said = done.fluxrun("schema", "--out", tmp_path / "pipe")
    assert said.code == 1
    assert "pipe: cannot be written (it exists and is no regular file); name another" in said.err
    assert (tmp_path / "pipe").is_fifo()
    said = done.fluxrun("schema", "--out", tmp_path / "new" / "folder" / "s.json")
    assert said.code == 0
    assert (tmp_path / "new" / "folder" / "s.json").is_file()


def test_nothing_of_a_lora_goes_unread(tmp_path: Path) -> None:
    """Were a key passed over, the change would be another one: every key of a file is read, or told."""
    tensors, _ = LAYOUTS["OneTrainer"]
    save_file({**tensors, "what.is.this": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(BadFileError, match=r"no layer of FLUX.1 \(1 key: what.is.this\)"):
        convert.convert(tmp_path / "x.safetensors", "kohya", None)
