"""Keys for small cards: what is recomputed, which attention, what waits in host memory. None changes what is learned, but
for another attention's rounding."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import House, desk_of, export_bytes, stopping_after
from test_objective import jolt, objective_of, spec_of
from torch import Tensor, nn

from runner.checkpoint.storage import Weights
from runner.core.errors import FluxrunError
from runner.model import device, offload
from runner.model.device import CopyStream, PendingCopy
from runner.model.flux1 import loading
from runner.model.flux1.transformer import blocks_of, set_attention
from runner.spec import attention
from runner.training.encoders import LiveEncoder
from runner.training.phases.train import load_encoders, load_transformer


def with_model(house: House, lines: str, **changes: str) -> Path:
    return spec_of(house, base=f'base = "builtin:tiny"\n{lines}', **changes)


def gradients(spec: Path) -> tuple[Tensor, dict[str, Tensor]]:
    objective, kinds = objective_of(desk_of(spec))
    jolt(kinds)
    return stepped(objective, kinds)


def stepped(objective: Any, kinds: dict[str, dict[str, nn.Parameter]]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = objective.loss(2, 0)
    loss.backward()
    found = {name: value.grad for kind in kinds.values() for name, value in kind.items()}
    assert all(grad is not None and grad.any() for grad in found.values())
    return loss.detach(), found


def equal(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> bool:
    return torch.equal(one[0], other[0]) and all(torch.equal(one[1][name], other[1][name]) for name in other[1])


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


def test_recomputing_some_blocks_changes_no_bit_and_keeps_less(house: House) -> None:
    """Of the tiny base's two and four blocks; with dropout, whose draws must come again."""
    found, held = [], []
    for every in ("false", "true", "1", "2", "4", "9"):
        spec = with_model(house, f"gradient_checkpointing = {every}", rank="rank = 4\ndropout = 0.3")
        size = [0]

        def pack(tensor: Tensor, size: list[int] = size) -> Tensor:
            size[0] += tensor.numel()
            return tensor

        objective, kinds = objective_of(desk_of(spec))
        jolt(kinds)
        calls = count_calls(objective.transformer)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective.loss(2, 0)
        calls.clear()
        found.append(stepped(objective, kinds))
        held.append(size[0])
        assert len(calls) == 6 + {"false": 0, "true": 5, "1": 5, "2": 3, "4": 2, "9": 1}[every]
    assert all(equal(found[0], other) for other in found[1:])
    assert held[1] == held[2] < held[3] < held[4] < held[5] < held[0]


@pytest.mark.parametrize(
    ("model", "inversion", "joint", "alone"),
    [
        ("", None, 0, 0),
        ("true", None, 5, 5),
        ("", 2, 3, 0),
        ("4", "false", 0, 2),
        ("", "true", 5, 0),
        ("", '"selective"', -5, 0),
        ('"selective"', 2, 3, -5),
        ('"selective"', None, -5, -5),
    ],
)
def test_blocks_are_recomputed_by_inversions_key_while_rows_learn(
    house: House, model: str, inversion: str | None, joint: int, alone: int
) -> None:
    """joint, alone: so many blocks with and without rows that learn; below zero: so many make their projections again. T5,
    which learns beside the transformer, goes with it."""
    lines, own = (f"gradient_checkpointing = {value}" if value else "" for value in (model, inversion))
    context = desk_of(with_model(house, lines, encoders=f'encoders = ["clip", "t5"]\n{own}'))
    for phase, count in zip(context.plan.training, (joint, alone), strict=True):
        context.model_pool.clear(context.base)
        transformer, _ = load_transformer(context, phase, Weights())
        blocks: list[Any] = blocks_of(transformer)
        assert sum(block.plain for block in blocks) == max(count, 0)
        assert sum(block.again for block in blocks) == max(-count, 0)
        assert transformer.gradient_checkpointing is (count > 0)
        for one in load_encoders(context, phase, Weights()).values() if phase.name == "joint" else ():
            assert isinstance(one, LiveEncoder)
            assert one.again is (one.encoder == "t5" and joint > 0)
            if one.encoder == "t5":
                assert {block.again for block in one.model.encoder.block} == {joint < 0}  # type: ignore[union-attr]


def count_calls(transformer: Any) -> list[str]:
    calls: list[str] = []
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    return calls


# ---- attention -----------------------------------------------------------------------------------------------------


def test_the_backends_are_diffusers_own() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert set(attention.BACKENDS) <= {one.value for one in AttentionBackendName}
    assert {*attention.PACKAGES, *attention.ON_A_GPU, *attention.HALF} <= set(attention.BACKENDS)


@pytest.mark.parametrize("backend", [one for one in attention.BACKENDS if one not in attention.ON_A_GPU])
def test_every_attention_of_a_cpu_trains(house: House, backend: str) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    loss, found = gradients(with_model(house, f'attention = "{backend}"'))
    assert _AttentionBackendRegistry.get_active_backend()[0].value == "native"  # the next run has not asked for it
    plain, wanted = gradients(spec_of(house))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-3 * grad.norm(), name


@pytest.mark.parametrize("backend", attention.ON_A_GPU)
def test_attention_that_is_not_here_is_refused_when_it_is_loaded(house: House, backend: str) -> None:
    transformer = loading.load_transformer(desk_of(spec_of(house)).base)
    with pytest.raises(FluxrunError, match=f"model.attention: {backend} needs an NVIDIA GPU"):
        set_attention(transformer, backend)


def test_half_attention_and_fp32_do_not_go_together(house: House) -> None:
    spec = with_model(house, 'attention = "_native_cudnn"\ndtype = "fp32"')
    said = house.fluxrun("plan", spec)
    assert said.code == 2
    assert 'model.attention: _native_cudnn takes bf16 and fp16 alone (model.dtype is fp32); use "native"' in said.err


# ---- offloading ----------------------------------------------------------------------------------------------------


class Sent(CopyStream):
    """A lane whose host memory holds nothing but NaN: whatever is computed with must have been sent. It counts what is there."""

    def __init__(self, where: torch.device) -> None:
        super().__init__(where)
        self.true: dict[int, Tensor] = {}
        self.order: list[int] = []

    def send(self, hosts: Any) -> PendingCopy:
        for host in hosts:
            if id(host) not in self.true:
                self.true[id(host)] = host.clone()
                host.view(torch.uint8).fill_(0xFF)  # NaN in every float, -1 in int8
        self.order.append(id(hosts))
        return PendingCopy([self.true[id(host)].clone() for host in hosts], None)


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
def test_offloaded_blocks_train_to_the_same_bits(house: House, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """LoRA with dropout, and rows through T5's blocks. At most two blocks of each model are there at a time, and the backward
    pass brings them from the last to the first."""
    lines, changes = f'quantize = "{scheme}"', {"rank": "rank = 4\ndropout = 0.3"}
    wanted = gradients(with_model(house, lines, **changes))
    chains: list[offload.BlockOffloader] = []
    made, come = offload.BlockOffloader.__init__, offload.BlockOffloader._come
    there: list[int] = []
    order: list[tuple[int, int]] = []

    def noted(chain: offload.BlockOffloader, *what: Any) -> None:
        made(chain, *what)
        chains.append(chain)

    def coming(chain: offload.BlockOffloader, index: int) -> None:
        come(chain, index)
        order.append((chains.index(chain), index))
        there.append(len(chain.coming) + 1)

    monkeypatch.setattr(offload, "CopyStream", Sent)
    monkeypatch.setattr(offload.BlockOffloader, "__init__", noted)
    monkeypatch.setattr(offload.BlockOffloader, "_come", coming)
    objective, kinds = objective_of(desk_of(with_model(house, f'{lines}\noffload = "blocks"', **changes)))
    jolt(kinds)
    order.clear()
    assert equal(stepped(objective, kinds), wanted)
    assert max(there) == 2
    flow, t5 = (chains.index(chain) for chain in chains[-2:])
    assert [index for which, index in order if which == flow] == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    assert [index for which, index in order if which == t5] == [0, 1, 1, 0]
    lane = chains[flow].lane
    assert isinstance(lane, Sent)
    assert len(lane.order) <= 14  # each once a pass, but for one where the pass turns: what comes next was foreseen


@pytest.mark.parametrize(
    ("first", "more"),
    [
        ('quantize = "int8"', 'offload = "blocks"'),
        ("", "gradient_checkpointing = 2"),
        ("", 'gradient_checkpointing = "selective"'),
        ('quantize = "int8"\ndtype = "bf16"', 'gradient_checkpointing = "selective"'),
    ],
    ids=["offload", "checkpointing", "selective", "selective, of codes in bf16"],
)
def test_a_run_that_saves_memory_is_the_same_run(house: House, first: str, more: str) -> None:
    """As typed: begun without, gone on with it, since that is not in the key; to the same bytes."""
    spec = with_model(house, first)
    assert house.fluxrun("queue", spec).code == 0
    runs = house.folder / "runs"
    whole = export_bytes(runs / "a")
    shutil.rmtree(runs / "a")
    with stopping_after(2):
        assert house.fluxrun("queue", spec).code == 3
    with_model(house, f"{first}\n{more}")
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    found = export_bytes(runs / "a")
    card = "export/README.md"  # names the settings
    assert {name: data for name, data in found.items() if name != card} == {
        name: data for name, data in whole.items() if name != card
    }
    assert house.fluxrun("sample", "a", "--prompt", "a TOK", "--steps", "1").code == 0


def test_steps_may_be_added_together_with_recomputing(house: House) -> None:
    """A run that is made longer, and saves memory from there on, has one reason less to be refused, not one more."""
    alone = {"encoders": 'encoders = ["clip"]\nuntil = 1.0'}
    spec = with_model(house, "", steps="steps = 2", **alone)
    assert house.fluxrun("queue", spec).code == 0
    with_model(house, "gradient_checkpointing = true", steps="steps = 3", **alone)
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    with_model(house, 'gradient_checkpointing = "selective"', steps="steps = 3", rank="rank = 2", **alone)
    said = house.fluxrun("queue", spec).err
    assert "lora.rank: 4 -> 2" in said
    assert "gradient_checkpointing" not in said


def test_offloading_and_what_it_does_not_go_with(house: House) -> None:
    spec = with_model(
        house,
        'offload = "blocks"\ngradient_checkpointing = 2\ncompile = true',
        encoders='encoders = ["clip"]\ngradient_checkpointing = "selective"',
    )
    said = house.fluxrun("plan", spec).err
    for table, every in (("model", 2), ("inversion", "'selective'")):
        told = f"blocks that are offloaded are all recomputed (found {every}); take this key out"
        assert f"{table}.gradient_checkpointing: {told}" in said
    assert "model.compile: compiled blocks cannot be offloaded (found true); take this key or model.offload out" in said


def test_what_selective_recomputing_does_not_go_with(house: House) -> None:
    selective = 'gradient_checkpointing = "selective"'
    spec = with_model(
        house,
        f"{selective}\ncompile = true",
        rank="rank = 4\ndropout = 0.5",
        encoders=f'encoders = ["clip"]\n{selective}',
    )
    said = house.fluxrun("plan", spec).err
    for table in ("model", "inversion"):
        key, way = f"{table}.gradient_checkpointing", "use true, or a number for every n-th"
        assert f'{key}: compiled blocks are recomputed as a whole (found "selective"); {way}' in said
        assert f'{key}: dropout would be drawn anew (found "selective", lora.dropout is 0.5); {way}' in said


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["none", "int8", "fp8", "nf4"])
def test_on_a_gpu_offloaded_blocks_train_to_the_same_bits_in_less_memory(house: House, scheme: str) -> None:
    found, peaks = [], []
    where = torch.device("cuda", 0)
    for where_they_wait in ("none", "blocks"):
        context = desk_of(
            with_model(house, f'quantize = "{scheme}"\noffload = "{where_they_wait}"\ngradient_checkpointing = true')
        )
        context = replace(context, base=replace(context.base, device=where, dtype=torch.bfloat16))
        objective, kinds = objective_of(context)
        jolt(kinds)
        stepped(objective, kinds)
        for kind in kinds.values():
            for value in kind.values():
                value.grad = None
        device.release(where)
        device.reset_peak(where)
        found.append(stepped(objective, kinds))
        torch.cuda.synchronize(where)
        peaks.append(device.peak_memory(where))
        del objective, kinds
        device.release(where)
    assert equal(found[0], found[1])
    assert peaks[1] < peaks[0]


# ---- compiling -----------------------------------------------------------------------------------------------------


def test_what_was_compiled_is_kept_in_the_users_own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    device.prepare_device(torch.device("cpu"), tf32=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "fluxrun" / "compile")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    device.prepare_device(torch.device("cpu"), tf32=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("lines", ["", 'quantize = "int8"', 'quantize = "nf4"', "gradient_checkpointing = 2"])
def test_compiled_blocks_train_close_to_the_plain_ones(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compile"))
    torch._dynamo.reset()  # or what the case before has compiled is taken from this process's memory
    loss, found = gradients(with_model(house, f"{lines}\ncompile = true"))
    plain, wanted = gradients(with_model(house, lines))
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=0)
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-3 * grad.norm(), name
    assert any((tmp_path / "compile").rglob("*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_part_read_straight_to_its_device_is_what_the_libraries_read(dtype: torch.dtype) -> None:
    """The way to a GPU, here to the CPU: every tensor, its dtype (T5 keeps some in fp32), and what comes out."""
    base = loading.open_base("builtin:tiny", None, None, torch.device("cpu"), dtype)
    for part, empty, load in (
        ("transformer", loading.empty_transformer, loading.load_transformer),
        ("text_encoder_2", loading.empty_t5, loading.load_t5),
    ):
        theirs, ours = load(base), loading.filled(empty, base, part)
        told, made = theirs.state_dict(), ours.state_dict()
        assert told.keys() == made.keys()
        for name, tensor in told.items():
            assert tensor.dtype == made[name].dtype, name
            assert torch.equal(tensor, made[name]), name
        assert not ours.training
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids)[0], ours(ids)[0])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_the_vae_is_in_memory_once() -> None:
    """Its convolutions are copied into another order; the file they come from is let go."""
    base = loading.open_base("builtin:tiny", None, None, torch.device("cpu"), torch.float16)  # as its file has it
    vae = loading.load_vae(base)
    assert str(base.folder / "vae") not in Path("/proc/self/maps").read_text()
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in vae.parameters() if one.dim() == 4)
