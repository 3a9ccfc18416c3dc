"""One LoRA file for every program: alpha is the rank, and the trained scale is in the weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.checkpoint.storage import Weights, read
from runner.core import safetensors
from runner.core.errors import BadFileError
from runner.export import formats, verify
from runner.export.about import AdapterShapes
from runner.model.flux1 import layer_names
from tests.support.adapters import CASES, CONFIG, differs, loaded_changes, made, wanted_changes, written
from tests.support.cards import card_of
from tests.support.house import House
from tests.support.readers import comfyui_direct_changes
from tests.support.snippets import run as snippet


def described(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(safetensors.read_metadata(file)["lora_adapter_metadata"])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["attention+mlp, alpha", "all, odd alpha"])
def test_readers_with_and_without_metadata_get_the_same_change(
    case: str, dtype: torch.dtype, stock: Any, tmp_path: Path
) -> None:
    weights, shapes = made(CASES[case])
    file, _ = written(tmp_path, weights, shapes, dtype)
    wanted = wanted_changes(weights, shapes)
    direct = comfyui_direct_changes(load_file(file))
    stock.load_lora_weights(str(tmp_path), weight_name=file.name)
    loaded = loaded_changes(stock)
    stock.unload_lora_weights()
    assert direct.keys() == loaded.keys() == wanted.keys()
    assert differs(direct, loaded) < 1e-6
    error = verify.lora_file(file, formats.adapter(weights, shapes), dtype, layer_names.FLUX1)
    assert differs(direct, wanted) == pytest.approx(
        error, rel=1e-3, abs=1e-7
    )  # the fold's rounding is in what is told,
    assert error > 0 or case != "all, odd alpha"  # in fp32 too
    ranks = {
        prefix: shape.rank
        for prefix, shape in (("transformer", shapes.lora), ("text_encoder", shapes.text_lora))
        if shape
    }
    assert {prefix: described(file)[f"{prefix}.lora_alpha"] for prefix in ranks} == ranks


def test_an_alpha_that_is_the_rank_leaves_the_weights_alone(tmp_path: Path) -> None:
    weights, shapes = made(CASES["attention, clip"])
    folded, same = formats.folded(weights, shapes)
    assert same == shapes
    assert all(folded.lora[name] is value for name, value in weights.lora.items())
    assert all(folded.text_lora[name] is value for name, value in weights.text_lora.items())


def test_a_file_that_needs_its_alpha_is_no_export(tmp_path: Path) -> None:
    weights, shapes = made(CASES["attention+mlp, alpha"])
    formats.write_lora(tmp_path / "f.safetensors", weights, shapes)  # not folded
    with pytest.raises(BadFileError, match=r"f.safetensors: .* has alpha 2 where its rank is 4"):
        verify.lora_file(tmp_path / "f.safetensors", formats.adapter(weights, shapes), torch.float32, layer_names.FLUX1)
    unscaled, its_shapes = Weights(weights.lora, {}, weights.text_lora), formats.folded(weights, shapes)[1]
    formats.write_lora(tmp_path / "f.safetensors", unscaled, its_shapes)  # alpha = rank, and no scale in the weights
    with pytest.raises(BadFileError, match="changes its layer otherwise than was trained"):
        verify.lora_file(tmp_path / "f.safetensors", formats.adapter(weights, shapes), torch.float32, layer_names.FLUX1)


def test_a_run_whose_alphas_are_not_the_ranks(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformer's and CLIP's, from the command line; and what an older fluxrun exported is kept until asked
    for."""
    spec = house.spec(rank="rank = 4\nalpha = 1.5", drop="[[tokens]]", steps="steps = 2", prompts="prompts = []")
    lines = spec.read_text().splitlines()
    at = lines.index("[inversion]")
    spec.write_text("\n".join([*lines[:at], *lines[at + 3 :], "[text_lora]", "rank = 4", "alpha = 3.0", ""]))
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    run = house.folder / "runs" / "a"
    file = run / "export" / formats.LORA_FILE
    learned = read(run / "checkpoints" / "step-000002.safetensors").weights
    found = comfyui_direct_changes(load_file(file))
    for prefix, lora, scale in (("", learned.lora, 1.5 / 4), ("text_encoder.", learned.text_lora, 3 / 4)):
        assert lora
        for name, down in lora.items():
            if ".lora_A." in name:
                module = name.removesuffix(".lora_A.weight")
                change = scale * (lora[f"{module}.lora_B.weight"] @ down)
                assert float((found[prefix + module] - change).abs().max()) <= 0.02 * float(change.abs().max()), module
    assert described(file)["transformer.lora_alpha"] == described(file)["text_encoder.lora_alpha"] == 4

    _, code = card_of(run)  # a card without learned words
    pasted = shutil.copytree(run / "export", house.folder / "pasted")
    names = snippet(code, pasted, monkeypatch)
    assert "rows" not in names
    assert names["image"].size == (64, 64)

    # as a fluxrun wrote it that left the scale to the metadata
    new = file.read_bytes()
    old = {f"transformer.{name}": value.bfloat16() for name, value in learned.lora.items()}
    save_file(old, file, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1.5, "transformer.r": 4})})
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    said = house.fluxrun("queue", spec)
    assert "skipped, done" in said.err
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    assert house.fluxrun("export", "a").code == 0
    assert file.read_bytes() == new


def test_convert_gives_one_file_for_every_program(house: House, stock: Any) -> None:
    """Also where the layers have different ranks and alphas."""
    generator = torch.Generator().manual_seed(0)
    d = CONFIG["attention_head_dim"] * CONFIG["num_attention_heads"]
    named: dict[str, torch.Tensor] = {}
    wanted = {}
    for module, key, rank, alpha, rows in (
        ("transformer_blocks.0.attn.to_out.0", "double_blocks_0_img_attn_proj", 4, 1.7, d),
        ("single_transformer_blocks.1.proj_out", "single_blocks_1_linear2", 2, 3.0, d),
        ("proj_out", "final_layer_linear", 3, 1.0, CONFIG["in_channels"]),
    ):
        down = torch.randn(rank, 5 * d if "linear2" in key else d, generator=generator) * 0.05
        up = torch.randn(rows, rank, generator=generator) * 0.05
        named |= {f"lora_unet_{key}.lora_down.weight": down, f"lora_unet_{key}.lora_up.weight": up}
        named[f"lora_unet_{key}.alpha"] = torch.tensor(alpha)
        wanted[module] = alpha / rank * (up @ down)
    save_file(named, house.folder / "mixed.safetensors")
    said = house.fluxrun("convert", "mixed.safetensors", "--to", "diffusers")
    assert said.code == 0, said.err
    file = house.folder / "mixed.diffusers.safetensors"
    assert differs(comfyui_direct_changes(load_file(file)), wanted) < 1e-7
    stock.load_lora_weights(str(house.folder), weight_name=file.name)
    found = loaded_changes(stock)
    stock.unload_lora_weights()
    assert found.keys() == wanted.keys()
    assert differs(found, wanted) < 1e-7
    told = described(file)
    assert told["transformer.alpha_pattern"] == told["transformer.rank_pattern"]


def test_shapes_of_one_adapter_alone() -> None:
    weights, shapes = made(CASES["clip alone"])
    folded, its_shapes = formats.folded(weights, shapes)
    assert its_shapes.lora is None
    assert its_shapes.text_lora is not None
    assert its_shapes.text_lora.alpha == its_shapes.text_lora.rank == 4
    assert isinstance(its_shapes, AdapterShapes)
    assert folded.lora == {}
