"""LoRA between diffusers' layout and the original one: every subset of layers, every scale, FLUX.1-dev's real
shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runner.base.layers import KNOWN_BASES, linear_layers, lora_layers
from runner.checkpoint.storage import Weights
from runner.core.errors import BadFileError
from runner.export import foreign_layouts, formats, lora_layouts, verify
from runner.export.lora_layouts import Adapter, Factors
from runner.model.base import Base
from runner.model.flux1 import layer_names
from tests.support.adapters import (
    CASES,
    CONFIG,
    LINEAR,
    TINY,
    differs,
    loaded_changes,
    made,
    random_lora,
    wanted_changes,
    written,
)
from tests.support.house import House
from tests.support.readers import comfyui_changes, comfyui_direct_changes, comfyui_rows, diffusers_reads_kohya

DEV = KNOWN_BASES["black-forest-labs/FLUX.1-dev"]
BASE = Base(TINY, None, torch.device("cpu"), torch.float32)
AROUND = {"everything": (tuple(LINEAR), 4, 2.0, True), "last layer": (("proj_out", "norm_out.linear"), 4, 8.0, False)}


def change(factors: Factors) -> Tensor:
    return factors.alpha / factors.down.shape[0] * (factors.up.float() @ factors.down.float())


@pytest.mark.parametrize("case", [*CASES, *AROUND])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_both_files_give_the_trained_change(case: str, dtype: str, tmp_path: Path) -> None:
    """By ComfyUI's rules; and the error that is told is the true one."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    weights, shapes = made((CASES | AROUND)[case])
    diffusers, kohya = written(tmp_path, weights, shapes, kind)
    trained = formats.adapter(weights, shapes)
    errors = (
        verify.lora_file(diffusers, trained, kind, layer_names.FLUX1),
        verify.kohya_file(kohya, trained, kind, layer_names.FLUX1),
    )
    found = comfyui_changes(load_file(kohya), CONFIG)
    wanted = wanted_changes(weights, shapes)
    largest = max(float(value.abs().max()) for value in wanted.values())
    assert differs(found, wanted) == pytest.approx(errors[1], rel=1e-3, abs=1e-6 * largest)
    direct = differs(comfyui_direct_changes(load_file(diffusers)), wanted)  # its scale is rounded with the weights
    assert direct == pytest.approx(errors[0], rel=1e-3, abs=1e-6 * largest)
    assert max(errors) < {"fp32": 1e-6, "bf16": 2e-2, "fp16": 2e-3}[dtype] * largest
    if dtype != "fp32":  # what it would be without rounding is far below
        exact = wanted_changes(formats.rounded(weights, kind), shapes)
        assert differs(found, exact) < 1e-6 * largest < errors[1]


def drawn(pipe: Any) -> np.ndarray[Any, Any]:
    image = pipe(
        "a large red heart on a navy background", num_inference_steps=2, guidance_scale=3.5, height=64, width=64,
        max_sequence_length=16, generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("case", CASES)
def test_stock_diffusers_reads_both_files_alike(
    case: str, stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers_reads_kohya(monkeypatch, 128)
    weights, shapes = made(CASES[case])
    wanted = wanted_changes(weights, shapes)
    pictures = [drawn(stock)]
    for file in written(tmp_path, weights, shapes, torch.float32):
        stock.load_lora_weights(str(tmp_path), weight_name=file.name)
        assert differs(loaded_changes(stock), wanted) < 1e-6
        pictures.append(drawn(stock))
        stock.unload_lora_weights()
    base, ours, original = pictures
    assert abs(ours - original).max() <= 1  # of 255
    assert abs(ours - base).max() > 1


def test_what_diffusers_does_not_read_in_the_original_layout(
    stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its converter names the layers around the blocks without `transformer.`, and its loader then passes them over in
    silence. The card says so. Where this fails, diffusers has learned it, and the card and the README can say less."""
    diffusers_reads_kohya(monkeypatch, 128)
    weights, shapes = made(AROUND["everything"])
    _, kohya = written(tmp_path, weights, shapes, torch.float32)
    stock.load_lora_weights(str(tmp_path), weight_name=kohya.name)
    found, wanted = loaded_changes(stock), wanted_changes(weights, shapes)
    stock.unload_lora_weights()
    assert wanted.keys() - found.keys() == set(layer_names.AROUND.values())
    assert differs(found, {name: value for name, value in wanted.items() if name in found}) < 1e-6


# ---- FLUX.1-dev's real shapes ---------------------------------------------------------------------------------------


def test_names_and_sizes_at_flux_devs_shapes() -> None:
    """On the meta device: what the model library calls the layers, and how sd-scripts' notes give the original's
    sizes."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**DEV)
        shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        parts = {
            name: Factors(torch.empty(4, width), torch.empty(height, 4), 4.0)
            for name, (height, width) in shapes.items()
        }
    assert shapes == linear_layers(DEV)
    named = lora_layouts.to_kohya(Adapter(parts, {}))
    sizes: dict[str, tuple[int, int, int]] = {}
    for index in range(19):
        for stream in ("img", "txt"):
            block = f"lora_unet_double_blocks_{index}_{stream}"
            sizes |= {f"{block}_attn_qkv": (9216, 12, 3072), f"{block}_attn_proj": (3072, 4, 3072),
                      f"{block}_mlp_0": (12288, 4, 3072), f"{block}_mlp_2": (3072, 4, 12288),
                      f"{block}_mod_lin": (18432, 4, 3072)}  # fmt: skip
    for index in range(38):
        block = f"lora_unet_single_blocks_{index}"
        sizes |= {f"{block}_linear1": (21504, 16, 3072), f"{block}_linear2": (3072, 4, 15360),
                  f"{block}_modulation_lin": (9216, 4, 3072)}  # fmt: skip
    for name, width in (("time", 256), ("vector", 768), ("guidance", 256)):
        sizes |= {f"lora_unet_{name}_in_in_layer": (3072, 4, width), f"lora_unet_{name}_in_out_layer": (3072, 4, 3072)}
    sizes |= {"lora_unet_img_in": (3072, 4, 64), "lora_unet_txt_in": (3072, 4, 4096),
              "lora_unet_final_layer_linear": (64, 4, 3072),
              "lora_unet_final_layer_adaLN_modulation_1": (6144, 4, 3072)}  # fmt: skip
    found = {
        name.removesuffix(".lora_up.weight"): (*up.shape, named[name.replace("_up", "_down")].shape[1])
        for name, up in named.items()
        if name.endswith(".lora_up.weight")
    }
    assert found == sizes
    assert len(named) == 3 * len(sizes)
    assert {f"lora_unet_{matrix.replace('.', '_')}" for matrix, _, _ in comfyui_rows(DEV).values()} == sizes.keys()


@pytest.mark.parametrize("wanted", ["attention", "all"])
def test_diffusers_own_reader_at_flux_devs_shapes(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpatched: every layer comes back with its change, tried on random inputs."""
    read = diffusers_reads_kohya(monkeypatch)
    layers = lora_layers(linear_layers(DEV), wanted)
    parts = lora_layouts.adapter_of(random_lora(layers, 1, 3), 2.0)
    state = read(lora_layouts.to_kohya(Adapter(parts, {})))
    found = {name.removeprefix("transformer.") for name in state}
    assert {f"{name}.lora_{side}.weight" for name in layers for side in "AB"} <= found
    generator = torch.Generator().manual_seed(0)
    for name in {name.rsplit(".lora_", 1)[0] for name in found}:
        down, up = (state[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        x = torch.randn(down.shape[1], generator=generator)
        change = parts[name].scale * (parts[name].up @ (parts[name].down @ x)) if name in parts else torch.zeros(())
        assert torch.allclose(up @ (down @ x), change, rtol=1e-4, atol=1e-5), name


# ---- between the layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, *AROUND])
def test_there_and_back_gives_the_same_factors(case: str) -> None:
    adapter = formats.adapter(*made((CASES | AROUND)[case]))
    back = foreign_layouts.read(lora_layouts.to_kohya(adapter), {}).adapter
    for ours, theirs in ((adapter.transformer, back.transformer), (adapter.text, back.text)):
        assert ours.keys() == theirs.keys()
        for name, part in ours.items():
            assert torch.equal(theirs[name].down, part.down)
            assert torch.equal(theirs[name].up, part.up)
            assert theirs[name].scale == pytest.approx(part.scale, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "told"),
    [(1, "odd0"), (5, "odd0, odd1, odd2, odd3, odd4"), (6, "odd0, odd1, odd2, odd3, odd4 and 1 more")],
)
def test_five_of_the_odd_keys_are_named(count: int, told: str) -> None:
    odd = {f"odd{number}": torch.zeros(1) for number in reversed(range(count))}
    for read in (lora_layouts.split_kohya, lambda named: lora_layouts.from_diffusers(named, {})):
        with pytest.raises(BadFileError, match=f"^{told}: no layer of FLUX.1 in "):
            read(odd)


def test_parts_of_different_rank_and_alpha_are_fused_exactly() -> None:
    """As files of others have them; also where one part is stored in bf16."""
    parts = {}
    for number, (letter, rank, alpha) in enumerate((("q", 2, 2.0), ("k", 5, 1.3), ("v", 1, 8.0))):
        lora = random_lora({"x": (128, 128)}, rank, number)
        name = f"transformer_blocks.1.attn.to_{letter}"
        up, down = lora["x.lora_B.weight"].bfloat16(), lora["x.lora_A.weight"].bfloat16()
        parts[name] = Factors(down if letter == "v" else down.float(), up if letter == "v" else up.float(), alpha)
    named = lora_layouts.to_kohya(Adapter(parts, {}))
    found = comfyui_changes(named, CONFIG)
    assert named["lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight"].shape == (8, 128)
    for name, part in parts.items():
        assert torch.allclose(found[name], change(part), atol=1e-8)


def test_a_dense_fused_matrix_is_split_by_its_rows() -> None:
    """As sd-scripts trains it: one adapter over q, k, v and the MLP, no blocks in it."""
    lora = random_lora({"x": (7 * 128, 128)}, 4, 0)
    key = "lora_unet_single_blocks_0_linear1"
    named = {
        f"{key}.lora_down.weight": lora["x.lora_A.weight"],
        f"{key}.lora_up.weight": lora["x.lora_B.weight"],
        f"{key}.alpha": torch.tensor(1.0),
    }
    parts = foreign_layouts.read(named, {}).adapter.transformer
    whole = torch.cat([change(parts[f"single_transformer_blocks.0.{name}"]) for name in layer_names.SINGLE["linear1"]])
    assert torch.allclose(whole, 0.25 * (lora["x.lora_B.weight"] @ lora["x.lora_A.weight"]), atol=1e-8)
    assert [part.up.shape[0] for part in parts.values()] == [128, 128, 128, 512]


# ---- what is wrong is found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_one_wrong_value_is_found_with_its_layer(layout: str, tmp_path: Path) -> None:
    weights, shapes = made(CASES["attention, clip"])
    files = dict(zip(("diffusers", "kohya"), written(tmp_path, weights, shapes, torch.bfloat16), strict=True))
    read = {"diffusers": verify.lora_file, "kohya": verify.kohya_file}[layout]
    for kind, name in (("lora", "transformer_blocks.1.attn.to_k"), ("text_lora", "encoder.layers.1.self_attn.q_proj")):
        changed = {key: value.clone() for key, value in getattr(weights, kind).items()}
        changed[f"{name}.lora_B.weight"][5, 1] += 1e-3
        other = Weights(**{"lora": weights.lora, "text_lora": weights.text_lora, kind: changed})
        with pytest.raises(
            BadFileError, match=f"{files[layout].name}: {name} changes its layer otherwise than was trained"
        ):
            read(files[layout], formats.adapter(other, shapes), torch.bfloat16, layer_names.FLUX1)


def test_a_lost_alpha_a_lost_layer_and_an_extra_one_are_found(tmp_path: Path) -> None:
    weights, shapes = made(CASES["attention+mlp, alpha"])
    adapter = formats.adapter(weights, shapes)
    rank4 = {name: Factors(part.down, part.up, 4.0) for name, part in adapter.transformer.items()}
    with pytest.raises(BadFileError, match="otherwise than was trained"):
        verify.compare("f", adapter, Adapter(rank4, adapter.text), torch.float32)
    name = "single_transformer_blocks.3.attn.to_v"
    less = {one: part for one, part in adapter.transformer.items() if one != name}
    with pytest.raises(BadFileError, match=f"f: {name} was trained and is not in it"):
        verify.compare("f", adapter, Adapter(less, adapter.text), torch.float32)
    with pytest.raises(BadFileError, match=f"f: {name} changes its layer otherwise"):
        verify.compare("f", Adapter(less, adapter.text), adapter, torch.float32)


def test_a_value_too_large_for_fp16_is_no_export(tmp_path: Path) -> None:
    weights, shapes = made(CASES["one q"])
    weights.lora["transformer_blocks.0.attn.to_q.lora_B.weight"][0, 0] = 1e5
    diffusers, _ = written(tmp_path, weights, shapes, torch.float16)
    with pytest.raises(BadFileError, match=r"transformer_blocks.0.attn.to_q changes its layer otherwise"):
        verify.lora_file(diffusers, formats.adapter(weights, shapes), torch.float16, layer_names.FLUX1)
    rows = Weights(rows={"clip": torch.full((2, 64), 1e5)})
    formats.write_embeddings(tmp_path, formats.rounded(rows, torch.float16), "a")
    with pytest.raises(BadFileError, match=r"a_emb.safetensors: clip_l has values that torch.float16 cannot hold"):
        verify.embeddings(tmp_path / "a_emb.safetensors", rows, torch.float16)


# ---- fluxrun convert -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_there_and_back(house: House, dtype: torch.dtype) -> None:
    weights, shapes = made(CASES["all, odd alpha"])
    weights = formats.rounded(weights, dtype)
    diffusers, _ = written(house.folder, weights, shapes, dtype)
    wanted = comfyui_direct_changes(load_file(diffusers))
    diffusers.rename(house.folder / "lora.safetensors")
    said = house.fluxrun("convert", "lora.safetensors", "--to", "kohya")
    assert (said.code, said.out) == (0, "lora.kohya.safetensors\n")
    assert "read back; the largest difference of a weight's change is" in said.err
    named = load_file(house.folder / "lora.kohya.safetensors")
    assert differs(comfyui_changes(named, CONFIG), wanted) < 1e-6
    said = house.fluxrun("convert", "lora.kohya.safetensors", "--to", "diffusers", "--out", "made/back.safetensors")
    assert (said.code, said.out) == (0, "made/back.safetensors\n")
    back = load_file(house.folder / "made" / "back.safetensors")
    for name, change in wanted.items():
        prefix = "text_encoder.text_model." if name.startswith("text_encoder.") else "transformer."
        module = prefix + name.removeprefix("text_encoder.")
        up, down = back[f"{module}.lora_B.weight"].float(), back[f"{module}.lora_A.weight"].float()
        assert torch.allclose(up @ down, change, atol=1e-6)


def test_convert_reads_what_diffusers_and_comfyui_spell_otherwise(house: House, stock: Any) -> None:
    """No alpha, peft's outer name; and ComfyUI's dots. The result loads in stock diffusers."""
    layers = lora_layers(LINEAR, ("transformer_blocks.1.attn.to_q",))
    lora = random_lora(layers, 2, 0)
    [name] = layers
    save_file(
        {f"base_model.model.transformer.{key}": value for key, value in lora.items()}, house.folder / "p.safetensors"
    )
    assert house.fluxrun("convert", "p.safetensors", "--to", "kohya").code == 0
    dotted = {
        key.replace("lora_unet_double_blocks_1_img_attn_qkv", "diffusion_model.double_blocks.1.img_attn.qkv"): value
        for key, value in load_file(house.folder / "p.kohya.safetensors").items()
    }
    save_file(dotted, house.folder / "dots.safetensors")
    said = house.fluxrun("convert", "dots.safetensors", "--to", "diffusers")
    assert said.code == 0, said.err
    stock.load_lora_weights(str(house.folder), weight_name="dots.diffusers.safetensors")
    found = loaded_changes(stock)
    stock.unload_lora_weights()
    assert found.keys() == {name}
    assert torch.allclose(found[name], lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"], atol=1e-7)


def test_convert_names_the_keys_it_does_not_know(house: House) -> None:
    key = "lora_unet_double_blocks_0_img_attn_qkx"
    save_file(
        {f"{key}.lora_down.weight": torch.zeros(2, 8), f"{key}.lora_up.weight": torch.ones(8, 2)},
        house.folder / "odd.safetensors",
    )
    said = house.fluxrun("convert", "odd.safetensors", "--to", "diffusers")
    assert said.code == 1
    assert said.err == (
        f"fluxrun: odd.safetensors: no layer of FLUX.1 (2 keys: {key}.lora_down.weight, {key}.lora_up.weight); wanted is a "
        "LoRA of FLUX.1\n"
    )
    (house.folder / "no.safetensors").write_bytes(b"PK\3\4 a pickle in a zip")
    said = house.fluxrun("convert", "no.safetensors", "--to", "kohya")
    assert said.code == 1
    assert "no.safetensors: not a safetensors file" in said.err
    said = house.fluxrun("convert", "odd.safetensors", "--to", "kohya", "--out", "odd.safetensors")
    assert "that is the file itself; name another" in said.err
