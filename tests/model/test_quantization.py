"""Bases whose transformer and T5 are held in fewer bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runner.base.layers import linear_layers
from runner.base.quantized_size import is_in_block, weight_bytes
from runner.checkpoint.storage import Weights, read
from runner.core.errors import FluxrunError
from runner.model import device, quantization
from runner.model.base import Base
from runner.model.flux1 import loading
from runner.model.quantization import QuantLinear
from runner.training.live_encoder import LiveEncoder
from tests.support.house import House
from tests.support.objectives import jolt, objective_of, spec_of
from tests.support.runs import context_of, export_bytes, stopping_after

# how far the trained loss of a pivotal run on the tiny base may lie from the plain base's, as a part of it
NEAR = {"int8": 0.02, "fp8": 0.03, "nf4": 0.15}
CPU = torch.device("cpu")


def quantised(house: House, scheme: str, **changes: str) -> Path:
    base = changes.pop("base", "builtin:tiny")
    return spec_of(house, base=f'base = "{base}"\nquantize = "{scheme}"', **changes)


def row_of(house: House) -> Any:
    return json.loads((house.folder / "runs" / "index.jsonl").read_text())


@pytest.fixture(scope="module")
def plain_loss(tmp_path_factory: pytest.TempPathFactory) -> float:
    house = House(tmp_path_factory.mktemp("plain"))
    assert house.fluxrun("queue", spec_of(house)).code == 0
    return float(row_of(house)["train_loss"])


@pytest.mark.parametrize("scheme", NEAR)
def test_a_quantised_base_trains_close_to_the_plain_one(house: House, plain_loss: float, scheme: str) -> None:
    """Rows in both encoders, then LoRA; export and pictures on the same base; and a resumed run is the same one."""
    said = house.fluxrun("queue", quantised(house, scheme))
    assert said.code == 0, said.err
    assert row_of(house)["train_loss"] != plain_loss
    assert row_of(house)["train_loss"] == pytest.approx(plain_loss, rel=NEAR[scheme])
    found = read(max((house.folder / "runs" / "a" / "checkpoints").glob("*.safetensors")))
    assert all(value.any() for value in found.weights.lora.values())
    assert set(found.weights.rows) == {"clip", "t5"}
    listed = {one["kind"]: one["entries"] for one in json.loads(house.fluxrun("cache", "--json").out)["kinds"]}
    assert listed["quantized"] == 2  # transformer and T5

    whole = export_bytes(house.folder / "runs" / "a")
    shutil.rmtree(house.folder / "runs" / "a")
    with stopping_after(4):
        assert house.fluxrun("queue", "a.toml").code == 3
    assert house.fluxrun("queue", "a.toml").code == 0
    assert export_bytes(house.folder / "runs" / "a") == whole


@pytest.mark.parametrize("scheme", NEAR)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loss_and_gradients_are_those_of_the_weights_the_codes_stand_for(house: House, scheme: str, dtype: str) -> None:
    """LoRA, and rows through T5: the same, bit for bit, as on a plain base with these weights; what the graph holds is
    codes."""
    spec = quantised(house, scheme, max_sequence_length=f'max_sequence_length = 32\ndtype = "{dtype}"')
    objective, kinds = objective_of(context_of(spec))
    jolt(kinds)
    weights = {(out, inside) for out, inside in linear_layers(objective.transformer.config).values()}  # type: ignore[arg-type]
    held: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.dtype != torch.float8_e4m3fn:
            held.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective.loss(2, 0)
    whole = [module for _, module in objective.transformer.named_modules() if type(module) is nn.Linear]
    plain = {tuple(module.weight.shape) for module in whole}  # LoRA's, and those outside the blocks
    assert not (weights - plain) & {*held, *(shape[::-1] for shape in held)}
    loss.backward()
    made = {
        name: value.grad.clone() for kind in kinds.values() for name, value in kind.items() if value.grad is not None
    }
    assert set(made) == {name for kind in kinds.values() for name in kind}
    assert all(grad.any() for grad in made.values())

    for model in (objective.transformer, *(e.model for e in objective.encoders.values() if isinstance(e, LiveEncoder))):
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                model.set_submodule(name, unpacked(module))
    for kind in kinds.values():
        for value in kind.values():
            value.grad = None
    again = objective.loss(2, 0)
    again.backward()
    assert torch.equal(again, loss)
    for kind in kinds.values():
        for name, value in kind.items():
            assert value.grad is not None
            assert torch.equal(value.grad, made[name]), name


def unpacked(module: QuantLinear) -> nn.Linear:
    made = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=module.dtype)
    made.weight = nn.Parameter(module.dequantized(), requires_grad=False)
    made.bias = module.bias
    return made.requires_grad_(False)


def test_a_row_of_zeros_and_odd_widths_come_back() -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, 96)
    weight[3] = 0
    for scheme, near in {"int8": 0.01, "fp8": 0.03, "nf4": 0.11}.items():
        codes, scale = quantization.quantize(weight, scheme)
        back = quantization.dequantize(codes, scale, scheme, (10, 96), torch.float32)
        assert (back - weight).norm() < near * weight.norm()
        assert not back[3].any()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of 31 million numbers, in several files."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=7,
        joint_attention_dim=128, pooled_projection_dim=64, axes_dims_rope=(8, 28, 28),
    )  # fmt: skip
    model.save_pretrained(folder / "transformer", max_shard_size="20MB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("scheme", NEAR)
def test_quantising_takes_the_memory_of_the_quantised_model_and_happens_once(
    large: Path, tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Base(large, None, CPU, torch.float32, scheme, tmp_path)
    if not device.CLEAR_REFS.exists():
        pytest.skip("the kernel tells no peak memory")

    def load() -> tuple[nn.Module, int]:
        device.release(CPU)
        device.reset_peak(CPU)
        before = device.peak_memory(CPU)
        made = loading.load_transformer(base)
        return made, device.peak_memory(CPU) - before

    loading.load_transformer(Base(large, None, CPU, torch.float32, scheme))  # what is imported only once
    first, peak = load()
    config = json.loads((large / "transformer" / "config.json").read_text())
    numbers = sum(
        value.numel() for value in loading.load_transformer(Base(large, None, CPU, torch.float32)).parameters()
    )
    size = sum(value.numel() * value.element_size() for value in first.state_dict().values())
    layers = linear_layers(config).items()
    quantized = sum(out * inside for name, (out, inside) in layers if is_in_block(name))
    assert weight_bytes(quantized, numbers - quantized, scheme, 4) == pytest.approx(size, rel=0.01)
    one = 448 * 5 * 448 * 4  # bytes of the largest weight, plain
    assert peak < 1.2 * size + 12 * one  # bitsandbytes has several copies of a weight at once; the plain model is 30
    monkeypatch.setattr(quantization, "quantize", None)  # the second time nothing is quantised
    second, peak = load()
    assert peak < 1.2 * size + 12 * one  # bitsandbytes has several copies of a weight at once; the plain model is 30
    assert same(first, second)

    monkeypatch.undo()
    [kept] = (tmp_path / "quantized").rglob("*.safetensors")
    content = bytearray(kept.read_bytes())
    content[-1000] ^= 1
    kept.write_bytes(content)
    assert same(first, load()[0])
    assert kept.read_bytes() != content


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours
    )


def test_captions_are_kept_apart_by_how_t5_reads_them(house: House) -> None:
    contexts = [context_of(spec_of(house)), *(context_of(quantised(house, scheme)) for scheme in NEAR)]
    keys = [
        [context.text_key(encoder, "a TOK", "diffusers", Weights()) for encoder in ("clip", "t5")]
        for context in contexts
    ]
    assert len({clip for clip, _ in keys}) == 1
    assert len({t5 for _, t5 in keys}) == 4
    assert len({tuple(context.latent_keys.values()) for context in contexts}) == 1
    assert len({context.plan.training[0].key for context in contexts}) == 4


def test_a_file_that_lacks_a_tensor_is_refused(house: House) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(context_of(spec_of(house)).base.folder, house.folder / "base")
    path = house.folder / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    found = load_file(path)
    found.pop("transformer_blocks.0.attn.to_q.weight")
    save_file(found, path)
    base = Base(house.folder / "base", None, CPU, torch.float32, "int8")
    with pytest.raises(FluxrunError, match=r"no file has transformer_blocks\.0\.attn\.to_q\.codes \(2 tensors"):
        loading.load_transformer(base)


def test_what_a_run_needs_at_least_is_told_by_its_scheme(tmp_path: Path) -> None:
    """Else `check` would refuse, on a small card, the very specs that are for it."""
    from runner.base.param_counts import parameter_counts
    from runner.plan.build import make_plan
    from runner.preflight.memory_floor import memory_floor
    from tests.support.plans import FACTS
    from tests.support.plans import spec_of as planned

    numbers = parameter_counts("black-forest-labs/FLUX.1-dev", {})
    found = {}
    for lines in ("", 'quantize = "int8"\n', 'quantize = "nf4"\n', 'offload = "blocks"\n'):
        spec = planned(tmp_path, f"[model]\n{lines}")
        need = memory_floor(spec, make_plan(spec, FACTS), numbers, on_gpu=True)
        found[lines.partition("=")[2].strip().strip('"')] = need.least
    assert found[""] > 22e9
    assert 11e9 < found["int8"] < 13e9
    assert 6e9 < found["nf4"] < 8e9
    assert found["blocks"] < 1e9
