"""The specs whose runs are held against the oracle (tests/support/oracle.py), and how far the two come apart.

`tests/integration/test_oracle.py` tests what `tools/oracle_table.py` prints: both measure here. `docs/randomness.md`
explains the tolerances.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from tests.support import oracle
from tests.support.house import House
from tests.support.paths import PROJECT

TINY = PROJECT / "runner" / "bases" / "tiny"
TOKEN = {"tokens": [{"name": "TOK"}]}
BOTH = {**TOKEN, "inversion.encoders": ["clip", "t5"], "inversion.lr": 1e-2}


@dataclass(frozen=True)
class Near:
    """How near two runs come: the largest relative difference of any step's loss (the eval loss, too), learning rate
    and gradient norm; and the mean difference of one kind's weights, as a part of how far they moved on average."""

    loss: float
    lr: float
    norm: float
    weights: float


# docs/randomness.md says where they come from.
FP32 = Near(loss=2e-5, lr=6e-6, norm=1e-4, weights=5e-4)
FP16 = Near(loss=2e-3, lr=6e-6, norm=4e-3, weights=0.02)
BF16 = Near(loss=0.02, lr=6e-6, norm=0.04, weights=0.2)

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
    "text lora": {
        "text_lora.rank": 4, "text_lora.alpha": 8.0, "text_lora.until": 0.5, "text_lora.lr": 3e-4, "optimizer.weight_decay": 0.3,
    },
    "prodigy over the pivot": {
        **BOTH, "inversion.lr": 1.0, "train.lr": 1.0, "optimizer.name": "prodigy", "optimizer.d0": 1e-4, "optimizer.d_coef": 2.0,
        "optimizer.weight_decay": 0.3,
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
    """The bundled base with FLUX.1-dev's `eos_token_id` of 2, by which transformers pools at the highest id: the first
    new token. The bundled base's own config names its real end token, where both ways of pooling are one."""
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


def near_of(name: str) -> Near:
    return {"bf16": BF16, "fp16": FP16}.get(str(SPECS[name].get("model.dtype")), FP32)


@dataclass(frozen=True)
class Difference:
    """what: a field of Near; where: the step or the kind of weights."""

    what: str
    where: str
    size: float


def relative(found: float | None, expected: float) -> float:
    if found is None or not math.isfinite(found):
        return math.inf
    return 0.0 if found == expected else abs(found - expected) / abs(expected) if expected else math.inf


def differences(run: Path, expected: oracle.Trained, start: dict[str, torch.Tensor]) -> Iterator[Difference]:
    """Of every step and every kind of weights; start: what the oracle's tensors were before the first step. Raises
    AssertionError where the two have no numbers of the same things."""
    found, last = history(run), len(expected.steps)
    same(sorted(found), list(range(1, last + 1)), "steps")
    for number, step in enumerate(expected.steps, 1):
        seen, where = found[number], f"step {number}"
        if not math.isfinite(step.grad_norm):  # fp16's scaler finds its scale by overflowing
            same(seen["train/grad_norm"], None, f"{where}: gradient norm")
            continue
        yield Difference("loss", where, relative(seen["train/loss"], step.loss))
        yield Difference("norm", where, relative(seen["train/grad_norm"], step.grad_norm))
        told = {name.removeprefix("lr/"): value for name, value in seen.items() if name.startswith("lr/")}
        same(sorted(told), sorted(step.lr), f"{where}: what has a learning rate")
        for kind, lr in step.lr.items():
            yield Difference("lr", f"{where}, {kind}", relative(told[kind], lr))
        same("eval/loss" in seen, step.eval_loss is not None, f"{where}: whether there is an eval loss")
        if step.eval_loss is not None:
            yield Difference("loss", f"{where}, eval loss", relative(seen["eval/loss"], step.eval_loss))
    tensors = trained_tensors(run)
    same(sorted(tensors), sorted(expected.tensors), "names of tensors")
    for kind in sorted({name.split("/")[0] for name in tensors}):
        names = [name for name in tensors if name.startswith(f"{kind}/")]
        moved = torch.cat([(expected.tensors[name] - start[name]).abs().flatten() for name in names]).mean()
        apart = torch.cat([(expected.tensors[name] - tensors[name]).abs().flatten() for name in names]).mean()
        assert moved > 0, f"{kind} did not move"
        yield Difference("weights", kind, float(apart / moved))


def same(found: object, expected: object, what: str) -> None:
    assert found == expected, f"{what}: {found}, but the oracle's: {expected}"


def compared_steps(expected: oracle.Trained) -> int:
    """Those whose gradients were finite."""
    return sum(math.isfinite(step.grad_norm) for step in expected.steps)


def too_far(found: Iterable[Difference], near: Near) -> list[str]:
    """What differs by more than it may; empty if all is near."""
    return [
        f"{one.what} of {one.where}: {one.size:.2g} apart, at most {getattr(near, one.what):.2g}"
        for one in found
        if not one.size <= getattr(near, one.what)
    ]


def both(house: House, changes: dict[str, Any]) -> tuple[Path, oracle.Trained, dict[str, torch.Tensor]]:
    """The run of a spec, what the oracle makes of it, and the tensors that it began with. changes: beside BASIC."""
    spec, base = write_spec(house, changes), base_of(house, changes)
    other = oracle.Oracle(spec, base)
    start = other.tensors()
    expected = other.train()
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    return house.folder / "runs" / "a", expected, start
