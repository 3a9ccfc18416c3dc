"""Recomputing some or all blocks changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from runner.checkpoint.storage import Weights
from runner.model.flux1.transformer import blocks_of
from runner.training.live_encoder import LiveEncoder
from runner.training.phases.train import load_encoders, load_transformer
from tests.support.house import House
from tests.support.objectives import count_calls, equal, jolt, objective_of, stepped, with_model
from tests.support.runs import context_of


def test_recomputing_some_blocks_changes_no_bit_and_keeps_less(house: House) -> None:
    """Of the tiny base's two and four blocks; with dropout, whose draws must come again."""
    found, held = [], []
    for every in ("false", "true", "1", "2", "4", "9"):
        spec = with_model(house, f"gradient_checkpointing = {every}", rank="rank = 4\ndropout = 0.3")
        size = [0]

        def pack(tensor: Tensor, size: list[int] = size) -> Tensor:
            size[0] += tensor.numel()
            return tensor

        objective, kinds = objective_of(context_of(spec))
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
    """joint, alone: so many blocks with and without rows that learn; below zero: so many make their projections again.
    T5, which learns beside the transformer, goes with it."""
    lines, own = (f"gradient_checkpointing = {value}" if value else "" for value in (model, inversion))
    context = context_of(with_model(house, lines, encoders=f'encoders = ["clip", "t5"]\n{own}'))
    for phase, count in zip(context.plan.training, (joint, alone), strict=True):
        context.model_pool.clear(context.base)
        transformer: FluxTransformer2DModel
        transformer, _ = load_transformer(context, phase, Weights())
        blocks: list[Any] = blocks_of(transformer)
        assert sum(block.save_activations for block in blocks) == max(count, 0)
        assert sum(block.recompute_projections for block in blocks) == max(-count, 0)
        assert transformer.gradient_checkpointing is (count > 0)
        for one in load_encoders(context, phase, Weights()).values() if phase.name == "joint" else ():
            assert isinstance(one, LiveEncoder)
            assert one.checkpointed is (one.encoder == "t5" and joint > 0)
            if one.encoder == "t5":
                assert {block.recompute_projections for block in one.model.encoder.block} == {joint < 0}  # type: ignore[union-attr]


def test_steps_may_be_added_together_with_recomputing(house: House) -> None:
    """A run that is made longer, and saves memory from there on, has one reason less to be refused, not one more."""
    alone = {"encoders": 'encoders = ["clip"]\nuntil = 1.0'}
    spec = with_model(house, "", steps="steps = 2", **alone)
    assert house.fluxrun("queue", spec).code == 0
    with_model(house, "gradient_checkpointing = true", steps="steps = 3", **alone)
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    with_model(house, 'gradient_checkpointing = "selective"', steps="steps = 3", rank="rank = 2", **alone)
    refusal = house.fluxrun("queue", spec).err
    assert "lora.rank: 4 -> 2" in refusal
    assert "gradient_checkpointing" not in refusal


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
        key, way = f"{table}.gradient_checkpointing", "use true, or n for every n-th block"
        assert f'{key}: compiled blocks are recomputed as a whole, got "selective"; {way}' in said
        assert (
            f'{key}: recomputation would draw another dropout, got "selective" with lora.dropout = 0.5; {way}' in said
        )
