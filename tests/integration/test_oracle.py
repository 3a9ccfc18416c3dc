"""Real runs, held step by step against a second trainer that shares no code with the first (tests/support/oracle.py).

Both compute the same sums in another order, so they differ by rounding: in fp32 by about 1e-6 of a number, in bf16 and fp16 by
what 8 and 11 bits hold. AdamW divides by the gradient's size, so where a gradient is nearly zero its rounding decides the
update's sign: single weights may differ by a whole update. Weights are therefore compared by their mean.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from runner.checkpoint.storage import Weights
from runner.runs.run import Run
from runner.training.objective import FlowObjective
from runner.training.phases.train import load_encoders, load_transformer
from tests.support import oracle
from tests.support.house import House
from tests.support.paths import PROJECT
from tests.support.runs import desk_of

TINY = PROJECT / "runner" / "bases" / "tiny"
TOKEN = {"tokens": [{"name": "TOK"}]}
BOTH = {**TOKEN, "inversion.encoders": ["clip", "t5"], "inversion.lr": 1e-2}


@dataclass(frozen=True)
class Near:
    """How near two runs come. loss, norm: of each step, relative; weights: mean difference, as a part of the mean change."""

    loss: float
    norm: float
    weights: float


FP32 = Near(loss=2e-5, norm=1e-4, weights=0.01)
BF16 = Near(loss=0.02, norm=0.04, weights=0.5)
FP16 = Near(loss=2e-3, norm=4e-3, weights=0.2)

# What is set beside BASIC, by the name of the spec.
SPECS: dict[str, dict[str, Any]] = {
    "lora": {},
    "warm-up over the pivot": {**BOTH, "inversion.until": 0.5, "schedule.name": "linear", "schedule.warmup": 4},
    "cosine, rates of their own": {**BOTH, "schedule.name": "cosine", "inversion.weight_decay": 0.5},
    "restarts": {**TOKEN, "schedule.name": "cosine_with_restarts", "schedule.warmup": 1, "schedule.cycles": 2},
    "polynomial": {"schedule.name": "polynomial", "schedule.power": 2.0, "schedule.warmup": 2},
    "constant with warm-up": {"schedule.name": "constant_with_warmup", "schedule.warmup": 3},
    "accumulation with a remainder": {"train.accumulate": 3, "train.batch_size": 2, "train.scale_lr": True},
    "repeats and crops": {"data.repeats": 3, "data.holdout": 4, "data.random_flip": True, "train.steps": 8},
    "buckets": {"data.buckets": True, "data.resolution": [48, 64], "data.variants": 2},
    "caption dropout": {**BOTH, "data.caption_dropout": 0.5},
    "lora dropout": {"lora.dropout": 0.4, "lora.layers": "attention+mlp", "lora.alpha": 2.0},
    "dropout and looks": {"lora.dropout": 0.5, "validate.every": 2, "data.holdout": 2},
    "prior": {**TOKEN, "prior.images": "class", "prior.prompt": "a picture of a disc", "prior.count": 3, "prior.weight": 0.7},
    "two tokens": {
        "tokens": [{"name": "TOK", "initializer": "red circle"}, {"name": "NEW", "vectors": 3}], "inversion.encoders": ["clip", "t5"],
    },
    "pooling as diffusers": {**TOKEN, "model.base": "dev", "validate.every": 2, "data.holdout": 2},
    "pooling at the end": {**TOKEN, "model.base": "dev", "inversion.pooling": "eos", "validate.every": 2, "data.holdout": 2},
    "pooling of both kinds": {**TOKEN, "model.base": "dev", "inversion.pooling": "both"},
    "inversion alone": {**BOTH, "lora.until": 0.0},
    "text lora": {"text_lora.rank": 4, "text_lora.alpha": 8.0, "text_lora.until": 0.5, "text_lora.lr": 3e-4},
    "prodigy over the pivot": {
        **BOTH, "inversion.lr": 1.0, "train.lr": 1.0, "optimizer.name": "prodigy", "optimizer.d0": 1e-4, "optimizer.d_coef": 2.0,
    },
    "8-bit adam": {"optimizer.name": "adamw8bit", "optimizer.beta1": 0.8},
    "sigma_sqrt": {"train.weighting.scheme": "sigma_sqrt"},
    "logit_normal": {"train.weighting.scheme": "logit_normal", "train.weighting.mean": 0.4, "train.weighting.std": 1.5},
    "mode": {"train.weighting.scheme": "mode", "train.weighting.scale": 0.8},
    "cosmap, low guidance": {"train.weighting.scheme": "cosmap", "train.guidance": 1.0},
    "bf16": {**BOTH, "model.dtype": "bf16"},
    "fp16, clipped": {"model.dtype": "fp16", "train.max_grad_norm": 0.5},
    "two processes": {**TOKEN, "compute.gpus": 2, "data.holdout": 3, "train.accumulate": 2},
}  # fmt: skip

BASIC = {
    "seed": 7, "model.base": "builtin:tiny", "model.max_sequence_length": 24, "model.dtype": "fp32", "data.source": "photos",
    "data.resolution": 64, "data.prompt": "NEW and TOK on a pale ground", "lora.rank": 4, "train.steps": 6, "train.batch_size": 2,
    "train.lr": 1e-3, "track.to": [],
}  # fmt: skip


def photos(folder: Path, count: int, *, captions: bool) -> None:
    """Pictures of several shapes, none a square; every second one with a caption of its own."""
    folder.mkdir()
    for number in range(count):
        picture = Image.new("RGB", (80 + 24 * (number % 3), 72 + 31 * (number % 2)), (240, 240 - 9 * number, 230))
        draw = ImageDraw.Draw(picture)
        draw.ellipse([6 + 4 * number, 10, 40 + 4 * number, 50], fill=(30 * number % 256, 120, 200 - 20 * number))
        draw.rectangle([0, 60, 20 + number, 70], fill=(200, 30 * number % 256, 40))
        picture.save(folder / f"p{number}.png")
        if captions and number % 2:
            (folder / f"p{number}.txt").write_text(f"a TOK number {number} beside NEW\n")


def dev_base(folder: Path) -> Path:
    """The bundled base with FLUX.1-dev's `eos_token_id` of 2, by which transformers pools at the highest id: the first new
    token. The bundled base's own config names its real end token, where both ways of pooling are one."""
    shutil.copytree(TINY, folder)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 2}))
    return folder


def base_of(house: House, changes: dict[str, Any]) -> Path:
    return dev_base(house.folder / "dev") if changes.get("model.base") == "dev" else TINY


def write_spec(house: House, changes: dict[str, Any]) -> Path:
    photos(house.folder / "photos", 7, captions=True)
    photos(house.folder / "class", 3, captions=False)
    tables: dict[str, Any] = {}
    for key, value in {**BASIC, **changes}.items():
        *names, last = key.split(".")
        table = tables
        for name in names:
            table = table.setdefault(name, {})
        table[last] = value
    return house.write("a.toml", tomli_w.dumps(tables))


def history(run: Path) -> dict[int, dict[str, float | None]]:
    found: dict[int, dict[str, float | None]] = {}
    for line in map(json.loads, (run / "history.jsonl").read_text().splitlines()):
        found.setdefault(line.pop("step"), {}).update(line)
    return found


def trained_tensors(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step-*.safetensors"))
    return {name: value for name, value in load_file(newest).items() if not name.startswith("optimizer/")}


def compare(run: Path, expected: oracle.Trained, start: dict[str, torch.Tensor], near: Near) -> None:
    """start: what the oracle's tensors were before the first step."""
    found = history(run)
    assert sorted(found) == list(range(1, len(expected.steps) + 1))
    for number, step in enumerate(expected.steps, 1):
        seen = found[number]
        if not math.isfinite(step.grad_norm):  # fp16's scaler finds its scale by overflowing
            assert seen["train/grad_norm"] is None, number
            continue
        assert seen["train/loss"] == pytest.approx(step.loss, rel=near.loss), number
        assert seen["train/grad_norm"] == pytest.approx(step.grad_norm, rel=near.norm), number
        told = {name.removeprefix("lr/"): value for name, value in seen.items() if name.startswith("lr/")}
        assert told == pytest.approx(step.lr, rel=1e-5), number
        if step.eval_loss is None:
            assert "eval/loss" not in seen, number
        else:
            assert seen["eval/loss"] == pytest.approx(step.eval_loss, rel=near.loss), number
    tensors = trained_tensors(run)
    assert tensors.keys() == expected.tensors.keys()
    for kind in sorted({name.split("/")[0] for name in tensors}):
        names = [name for name in tensors if name.startswith(f"{kind}/")]
        moved = torch.cat([(expected.tensors[name] - start[name]).abs().flatten() for name in names]).mean()
        apart = torch.cat([(expected.tensors[name] - tensors[name]).abs().flatten() for name in names]).mean()
        assert moved > 0, kind
        assert apart < near.weights * moved, kind


# What is special about these is held elsewhere, too, by a formula or a shorter test: `just slow` runs them.
BESIDE = {
    "restarts", "polynomial", "constant with warm-up", "logit_normal", "mode", "sigma_sqrt", "cosmap, low guidance", "8-bit adam",
    "two processes",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in BESIDE)) for name in SPECS])
def test_a_run_does_what_the_oracle_does(house: House, name: str) -> None:
    spec, base = write_spec(house, SPECS[name]), base_of(house, SPECS[name])
    near = {"bf16": BF16, "fp16": FP16}.get(str(SPECS[name].get("model.dtype")), FP32)
    other = oracle.Oracle(spec, base)
    start = other.tensors()
    expected = other.train()
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    compare(house.folder / "runs" / "a", expected, start, near)


def test_a_halved_micro_batch_is_the_same_batch(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """After memory fell short: the sums are taken in another order, and that is all."""
    spec = write_spec(
        house, {**BOTH, "train.batch_size": 4, "prior.images": "class", "prior.prompt": "a disc", "prior.count": 3}
    )
    other = oracle.Oracle(spec, TINY)
    start = other.tensors()
    monkeypatch.setattr(Run, "split", lambda self, batch_size: 2)
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    compare(house.folder / "runs" / "a", other.train(), start, FP32)


def test_a_look_changes_nothing_of_what_follows(house: House) -> None:
    """Dropout goes on after the eval loss was taken: the same loss, to the bit, before and after."""
    context = desk_of(write_spec(house, {"lora.dropout": 0.5}))
    [phase] = context.plan.training
    transformer, adapter = load_transformer(context, phase, Weights())
    with torch.no_grad():
        for parameter in adapter.values():  # B is zero at first, and hides what dropout does
            parameter += 0.1
    objective = FlowObjective(context, transformer, load_encoders(context, phase, Weights()))
    before = objective.loss(0, 0)
    first = objective.evaluate()
    assert torch.equal(objective.loss(0, 0), before)
    torch.rand(1)  # else dropout would be drawn as in the first look
    assert objective.evaluate() == first  # without dropout
    objective.close()
