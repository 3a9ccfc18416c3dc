"""FLUX's lean blocks against diffusers' own: the same numbers forward and backward, less kept, nothing left behind."""

from __future__ import annotations

import gc
import statistics
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor
from transformers import T5EncoderModel

from runner.base.layers import linear_layers, lora_layers
from runner.checkpoint.storage import Weights
from runner.model import base as bases
from runner.model import flow_matching, lora, recomputation, token_rows
from runner.model.device import autocast
from runner.model.families import family_of
from runner.model.family import PromptEmbeds
from runner.model.flux1 import loading, recompute, recompute_t5, transformer
from runner.training.live_encoder import LiveEncoder
from tests.support.house import House
from tests.support.runs import context_of
from tests.support.saved_tensors import counted

CONFIG: dict[str, Any] = {
    "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 24, "pooled_projection_dim": 12, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
STOCK = (FluxTransformerBlock, FluxSingleTransformerBlock)


def made(
    *, spared: bool, every: int = 0, again: bool = False, layers: str = "attention+mlp", dropout: float = 0.0, adapted: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Any:  # fmt: skip
    """With weights other than zero everywhere, norms' and both LoRA factors' too; the same from call to call."""
    torch.manual_seed(3)
    model: Any = FluxTransformer2DModel(**CONFIG).requires_grad_(False)
    if adapted:
        chosen = tuple(lora_layers(linear_layers(CONFIG), layers))
        lora.attach_lora(model, lora.LoraShape(4, 10.0, dropout, chosen), seed=1)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = noise if ".lora_" in name else (parameter.data + noise).to(dtype)
    if spared:
        recompute.enable_recompute(
            model, checkpointed=transformer.checkpointed_blocks(model, every), recompute_projections=again
        )
    return model.train()


def run(
    model: Any, images: int, learns: bool, dtype: torch.dtype = torch.float32, *, back: bool = True
) -> dict[str, Tensor]:
    """The output, and every gradient. learns: whether what comes from the text encoders does."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(images, 6, CONFIG["in_channels"], generator=generator)
    txt = torch.randn(images, 5, CONFIG["joint_attention_dim"], generator=generator).requires_grad_(learns)
    vec = torch.randn(images, CONFIG["pooled_projection_dim"], generator=generator).requires_grad_(learns)
    noised = flow_matching.NoisyBatch(noise, noise, torch.ones(images, 1, 1), torch.linspace(0.2, 0.9, images))
    predict = transformer.predictor(model, 3.5, torch.device("cpu"), dtype)
    with autocast(torch.device("cpu"), dtype):
        out = predict(noised, PromptEmbeds(txt, vec), 4, 6)
    if not back:
        return {"out": out}
    found = {"out": out.detach()}
    if out.requires_grad:
        out.float().pow(3).sum().backward()
        found |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if learns:
        assert txt.grad is not None
        assert vec.grad is not None
        found |= {"txt": txt.grad, "vec": vec.grad}
    return found


def far(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative distance of two tensors of one name."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - value).norm() / value.norm()) for name, value in theirs.items() if value.norm())


@pytest.mark.parametrize("layers", ["attention", "attention+mlp", "all"])
@pytest.mark.parametrize("learns", [True, False], ids=["encoders learn", "encoders frozen"])
@pytest.mark.parametrize("images", [1, 3])
def test_lean_blocks_are_diffusers_but_for_rounding(images: int, learns: bool, layers: str) -> None:
    ours, theirs = (run(made(spared=spared, layers=layers), images, learns) for spared in (True, False))
    assert len(theirs) > 25
    assert far(ours, theirs) < 1e-5


def test_adapted_layers_that_read_the_same_are_one_step() -> None:
    """A double block has two times three, and six lone ones; a single block three, of which the last one's keys and
    values read more tokens than its queries."""
    from tests.support.saved_tensors import graph

    model = made(spared=True)
    noised = flow_matching.NoisyBatch(torch.randn(1, 6, 8), torch.zeros(1, 6, 8), torch.ones(1, 1, 1), torch.ones(1))
    predict = transformer.predictor(model, 3.5, torch.device("cpu"), torch.float32)
    out = predict(noised, PromptEmbeds(torch.randn(1, 5, 24), torch.randn(1, 12)), 4, 6)
    steps = [node.name() for node in graph(out.grad_fn)]
    assert steps.count("_FusedLoraBackward") == 2 * (2 + 6) + 1 + 2


def test_encoders_alone_can_learn_through_them() -> None:
    ours, theirs = (run(made(spared=spared, adapted=False), 2, True) for spared in (True, False))
    assert ours.keys() == {"out", "txt", "vec"}
    assert far(ours, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_they_are_as_near_to_full_precision(dtype: torch.dtype) -> None:
    full = run(made(spared=False), 2, True)
    ours, theirs = (far(run(made(spared=spared, dtype=dtype), 2, True, dtype), full) for spared in (True, False))
    assert 0 < ours < 1.2 * theirs


def test_dropout_is_drawn_as_in_diffusers_blocks() -> None:
    """But for the last one, which has less to draw for."""
    found = []
    for spared in (True, False):
        model = made(spared=spared, dropout=0.5)
        model.single_transformer_blocks[-1].last = False
        torch.manual_seed(0)
        found.append(run(model, 2, True))
    assert far(*found) < 1e-5


@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpointed_blocks_compute_the_same_bits_and_all_come_back(every: int) -> None:
    """The last one is never recomputed: its turn is the first."""
    model = made(spared=True, every=every)
    blocks = transformer.blocks_of(model)
    plain = {1: [True, True, True, False], 2: [True, False, True, False], 3: [True, False, False, False]}
    assert [block.save_activations for block in blocks] == plain[every]
    assert [getattr(block, "last", False) for block in blocks] == [False, False, False, True]
    transformer.enable_gradient_checkpointing(model, transformer.checkpointed_blocks(model, every))
    ours, theirs = run(model, 2, True), run(made(spared=True), 2, True)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    recompute.disable_recompute(model)
    assert all(type(block) in STOCK and not {"plain", "last"} & vars(block).keys() for block in blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", ["attention", "attention+mlp", "all", None])
@pytest.mark.parametrize("learns", [True, False], ids=["encoders learn", "encoders frozen"])
@pytest.mark.parametrize("images", [1, 3])
def test_projections_that_are_made_again_are_the_same_bits(
    images: int, learns: bool, layers: str | None, dtype: torch.dtype
) -> None:
    """Of all blocks but the last, with less kept."""
    if not (learns or layers):
        pytest.skip("nothing learns")
    found, kept = [], []
    for again in (True, False):
        model = made(spared=True, again=again, layers=layers or "all", adapted=layers is not None, dtype=dtype)
        assert [block.recompute_projections for block in transformer.blocks_of(model)] == [again, again, again, False]
        forward = lambda model=model: run(model, images, learns, dtype, back=False)["out"]  # noqa: E731
        kept.append(counted([model], forward))
        found.append(run(model, images, learns, dtype))
    assert len(found[0]) > 2
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    assert kept[0] < 0.8 * kept[1]


def test_without_gradients_they_are_diffusers_to_the_bit() -> None:
    found = []
    for spared in (True, False):
        with torch.no_grad():
            found.append(run(made(spared=spared), 2, False)["out"])
    assert torch.equal(*found)


@pytest.mark.parametrize(("again", "count"), [(False, 2 * 9 + 2 * 4), (True, 2 * 13 + 5 + 4)])
def test_nothing_of_a_step_outlives_it(monkeypatch: pytest.MonkeyPatch, again: bool, count: int) -> None:
    """Neither what was kept, nor what was made again: both are dropped during the backward pass, block by block."""
    known: list[weakref.ref[recomputation.RecomputedTensor]] = []
    init = recomputation.RecomputedTensor.__init__
    most = [0]

    def watched(self: recomputation.RecomputedTensor, *rest: Any) -> None:
        init(self, *rest)
        known.append(weakref.ref(self))

    def making(self: recomputation.RecomputedTensor) -> tuple[Tensor, ...]:
        found = real(self)
        most[0] = max(most[0], sum(bool(one and one._outputs) for one in (ref() for ref in known)))
        return found

    real = recomputation.RecomputedTensor.outputs
    monkeypatch.setattr(recomputation.RecomputedTensor, "__init__", watched)
    monkeypatch.setattr(recomputation.RecomputedTensor, "outputs", making)
    gc.disable()
    try:
        run(made(spared=True, again=again), 2, True)
    finally:
        gc.enable()
    assert len(known) == count
    assert not any(ref() for ref in known)
    assert 0 < most[0] <= (7 if again else 4)


def test_a_tensor_is_made_again_once_for_all_its_readers() -> None:
    calls = []

    class Doubled(recomputation.RecomputeOp):
        def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            calls.append(1)
            return (2 * inputs[0],)

        def gradients(self, grad: Tensor, *_: Any) -> tuple[Tensor]:
            return (2 * grad,)

    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    read = recomputation.recompute(Doubled(), x, save=False)
    with recomputation.recompute_on_backward(read):
        out = (read[0] @ weight).sum() + (read[0][1:].t() @ read[0][1:]).sum()
    out.backward()
    assert len(calls) == 2
    grads = x.grad, weight.grad
    x.grad = weight.grad = None
    ((2 * x) @ weight).sum().add((2 * x[1:]).t().matmul(2 * x[1:]).sum()).backward()
    for ours, theirs in zip(grads, (x.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- T5 --------------------------------------------------------------------------------------------------------------


def t5_with_rows(dtype: torch.dtype = torch.float32) -> LiveEncoder:
    base = bases.open_base("builtin:tiny", None, None, torch.device("cpu"), dtype)
    model, tokenizer = loading.load_t5(base), loading.load_tokenizer(base, "t5")
    live = LiveEncoder(family_of(base), "t5", model, tokenizer, token_rows.table_std(model))
    live.rows = torch.nn.Parameter(token_rows.initial_rows(model, tokenizer, [(2, None)], 0, "t5"))
    token_rows.attach_token_rows(model, tokenizer, ["<s0>", "<s1>"], live.rows)
    live.ids |= {one: live._token_ids(one, 32) for one in ("a <s0><s1>", "b")}
    return live


def t5_run(live: LiveEncoder, seed: int = 0) -> dict[str, Tensor]:
    assert live.rows is not None
    live.rows.grad = None
    states = live.embed(["a <s0><s1>", "b"], "diffusers").float()
    (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(seed))).sum().backward()
    assert live.rows.grad is not None
    return {"states": states.detach(), "rows": live.rows.grad}


def test_a_t5_that_learns_is_transformers_but_for_rounding_and_keeps_half() -> None:
    found, kept = [], []
    for way in ("stock", "lean", "again", "selective"):
        live = t5_with_rows()
        if way != "stock":
            live.checkpointed = way == "again"
            recompute_t5.enable_recompute(
                live.model, save_activations=live.checkpointed, recompute_projections=way == "selective"
            )
        kept.append(counted([live.model], lambda live=live: live.embed(["a <s0><s1>", "b"], "diffusers")))  # type: ignore[misc]
        found.append(t5_run(live))
    stock, lean, *others = found
    assert far(lean, stock) < 5e-5
    assert all(torch.equal(other[name], value) for other in others for name, value in lean.items())
    assert lean["rows"].abs().min() > 0
    assert kept[2] < 2000 < kept[3] < 0.4 * kept[1] < 0.4 * 0.55 * kept[0]  # its ids alone; a third of half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_t5_that_learns_in_16_bits_is_about_as_near_to_full_precision(dtype: torch.dtype) -> None:
    """As a median over rows: of a single gradient in bf16, a fifth is rounding."""
    full, stock, lean = t5_with_rows(), t5_with_rows(dtype), t5_with_rows(dtype)
    recompute_t5.enable_recompute(lean.model, save_activations=False)
    found: dict[str, list[float]] = {"states": [], "rows": []}
    for seed in range(20):
        for live in (full, stock, lean):
            assert live.rows is not None
            rows = torch.randn(live.rows.shape, generator=torch.Generator().manual_seed(seed))
            live.rows.data.copy_(rows * live.table_std)
        exact, theirs, ours = (t5_run(live, seed) for live in (full, stock, lean))
        for name, ratios in found.items():
            distances = [float((one[name] - exact[name]).norm()) for one in (ours, theirs)]
            assert min(distances) > 0
            ratios.append(distances[0] / distances[1])
    assert statistics.median(found["states"]) < 1.1
    assert statistics.median(found["rows"]) < 1.5


@pytest.mark.parametrize(
    ("model", "plain", "again"),
    [("", False, False), ("gradient_checkpointing = true", True, True), ('offload = "blocks"', True, False)],
)
def test_a_run_s_t5_has_lean_blocks_where_it_learns(tmp_path: Path, model: str, plain: bool, again: bool) -> None:
    """Plain ones where checkpointing, of all of it or block by block, sees to what is kept."""
    context = context_of(House(tmp_path).spec(base=f'base = "builtin:tiny"\n{model}'))
    live = LiveEncoder.load(context, "t5", Weights(), learn_rows=True)
    t5: T5EncoderModel = live.model
    assert [(type(block), block.save_activations) for block in t5.encoder.block] == [
        (recompute_t5.RecomputeT5Block, plain)
    ] * 2
    assert live.checkpointed is again
    live = LiveEncoder.load(context, "t5", Weights())
    t5 = live.model
    assert not any(isinstance(block, recompute_t5.RecomputeT5Block) for block in t5.encoder.block)


def test_what_overflows_in_16_bits_is_clamped_as_transformers_do() -> None:
    kept = torch.tensor([1.0, -65504.0, float("inf"), -float("inf")], dtype=torch.float16)
    assert recompute_t5.clamp_fp16(kept).tolist() == [1.0, -64512.0, 64512.0, -64512.0]
    assert torch.equal(recompute_t5.clamp_fp16(kept.float()), kept.float())


def test_a_t5_that_learns_nothing_now_is_transformers_to_the_bit() -> None:
    found = []
    for spared in (True, False):
        live = t5_with_rows()
        if spared:
            recompute_t5.enable_recompute(live.model, save_activations=False)
        with torch.no_grad():
            found.append(live.embed(["a <s0><s1>"], "diffusers"))
    assert torch.equal(*found)
