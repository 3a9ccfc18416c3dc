"""The fused layer against peft's own: the same numbers forward and backward, and peft's way where it is asked for
more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from runner.model.fused_lora import FusedLinear, fuse_linears, fused_forward
from tests.support.saved_tensors import graph


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())  # type: ignore[no-any-return]


def adapted(fused: bool, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Two:
    """Alpha is not the rank; both factors are other than zero; everything is the same from call to call."""
    torch.manual_seed(3)
    model = Two().requires_grad_(False).to(dtype)
    config = LoraConfig(
        r=4, lora_alpha=10, lora_dropout=dropout, target_modules=["first", "second"], init_lora_weights=False
    )
    inject(config, model, fused)
    assert not fused or type(model.first) is type(model.second) is FusedLinear
    return model


def inject(config: LoraConfig, model: nn.Module, fused: bool) -> None:
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape) / 3
    if fused:
        fuse_linears(model)


def learned(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    with torch.autocast(
        "cpu", torch.bfloat16, enabled=model.get_parameter("first.base_layer.weight").dtype == torch.bfloat16
    ):
        out = model(x)
    out.float().pow(3).sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"out": out.detach(), **found, **({"x": x.grad} if x.grad is not None else {})}


def entry(shape: tuple[int, ...], grad: bool) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_(grad)


@pytest.mark.parametrize("grad", [True, False], ids=["input learns", "input given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
def test_fused_is_peft_but_for_rounding(shape: tuple[int, ...], dtype: torch.dtype, grad: bool) -> None:
    ours, theirs = (learned(adapted(fused, dtype), entry(shape, grad)) for fused in (True, False))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 5 + grad
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        rtol = 1e-5 if dtype == torch.float32 else 0.04
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=rtol * float(value.abs().max()), msg=name)


class Three(nn.Module):
    """Layers that read the same, of several ranks; `lone` has no adapter."""

    one: nn.Linear
    lone: nn.Linear
    two: nn.Linear
    three: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        for place, name in enumerate(("one", "lone", "two", "three")):
            setattr(self, name, nn.Linear(12, 5 + place, bias=name != "two"))

    def forward(self, x: Tensor) -> Tensor:
        outs = fused_forward(x, self.one, self.lone, self.two, self.three)
        return torch.cat(outs, -1)


def three(fused: bool, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    model = Three().requires_grad_(False).to(dtype)
    config = LoraConfig(
        r=4, lora_alpha=10, lora_dropout=dropout, target_modules=["one", "two", "three"], init_lora_weights=False,
        rank_pattern={"two": 2}, alpha_pattern={"three": 3},
    )  # fmt: skip
    inject(config, model, fused)
    return model


@pytest.mark.parametrize("grad", [True, False], ids=["input learns", "input given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_read_the_same_are_pefts_but_for_rounding(dtype: torch.dtype, grad: bool) -> None:
    found = []
    for fused in (True, False):
        model, x = three(fused, dtype), entry((2, 5, 12), grad)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(x)
        out.float().pow(3).sum().backward()
        steps = {one.name() for one in graph(out.grad_fn)}
        assert ("_FusedLoraBackward" in steps) is fused
        grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        found.append({"out": out.detach(), **grads, **({"x": x.grad} if grad else {})})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert len(ours) == 7 + grad
    for name, value in theirs.items():
        rtol = 1e-5 if dtype == torch.float32 else 0.04
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=rtol * float(value.abs().max()), msg=name)


def test_of_layers_that_read_the_same_only_what_learns_gets_a_gradient() -> None:
    model = three(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("one.lora_A.default.weight", "three.lora_B.default.weight"))
    every = three(True)
    x = entry((7, 12), False)
    for one in (model, every):
        one(x).pow(3).sum().backward()
    learned = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert sorted(learned) == ["one.lora_A.default.weight", "three.lora_B.default.weight"]
    for name, grad in learned.items():
        wanted = every.get_parameter(name).grad
        assert wanted is not None
        assert torch.equal(grad, wanted)


def test_a_batch_that_is_not_contiguous() -> None:
    x = entry((12, 3, 4), False).permute(1, 2, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(adapted(True)(x), adapted(False)(x))


def test_frozen_adapters_get_no_gradient_and_let_it_through() -> None:
    found = []
    for fused in (True, False):
        model, x = adapted(fused).requires_grad_(False), entry((7, 12), True)
        found.append(learned(model, x))
    assert found[0].keys() == {"out", "x"}
    torch.testing.assert_close(found[0]["x"], found[1]["x"])


@pytest.mark.parametrize("make", [adapted, three])
def test_dropout_is_drawn_as_peft_draws_it(make: Callable[..., nn.Module]) -> None:
    outputs = []
    for fused in (True, False):
        model = make(fused, dropout=0.5).train()
        torch.manual_seed(0)
        outputs.append(model(entry((7, 12), False)))
    assert torch.equal(*outputs)


def test_a_layer_that_is_switched_off_or_merged_is_left_to_peft() -> None:
    model, x = adapted(True), entry((7, 12), False)
    with_it = model(x)
    layers: list[PeftLinear] = [model.first, model.second]
    for layer in layers:
        layer.enable_adapters(False)
    without = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(without, Two()(x))
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    torch.testing.assert_close(model(x), with_it, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(with_it, without)


def test_nothing_but_plain_layers_is_fused() -> None:
    class Quantised(nn.Linear):
        pass

    model = nn.ModuleDict({"one": Quantised(4, 4), "two": nn.Linear(4, 4)})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["one", "two"]), model)
    fuse_linears(model)
    assert [type(model[name]) for name in ("one", "two")] == [PeftLinear, FusedLinear]


def test_no_more_is_saved_for_the_backward_pass() -> None:
    def saved(fused: bool) -> int:
        model, sizes = adapted(fused), dict[int, Tensor]()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if (place := tensor.untyped_storage().data_ptr()) not in own:
                sizes[place] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(entry((64, 12), False))
        assert out.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in sizes.values())

    assert saved(True) <= saved(False)
