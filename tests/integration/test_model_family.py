"""A second model family, made up here, trains, resumes and exports through the same code as FLUX.1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from runner.base.architectures import architecture_of
from runner.cache.store import Cache
from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint, Weights
from runner.core.errors import ExitCode, FluxrunError, SpecError
from runner.core.events import EventLog
from runner.engine.worker_main import TrainRequest, WorkerState, train_run
from runner.jobs.job import Job
from runner.jobs.prepare import prepare_jobs
from runner.model import lora
from runner.runs.claim import claim_run
from runner.training.adapter_shapes import lora_shape
from runner.training.context import RunContext, open_base
from runner.training.distributed import Ranks
from runner.training.encoders import CachedEncoder
from runner.training.objective import FlowObjective
from tests.support.toy_family import HIDDEN, SCALING, SHIFT, WIDTH, WORDS, linear_layers, register, word_ids, write_base

STEPS, RANK, LR = 24, 2, 0.05
CAPTIONS = ("a red square", "a green square", "a blue square")
COLOURS = ((220, 40, 30), (30, 200, 60), (40, 60, 230))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy base and three pictures, each half one colour and half black."""
    register(monkeypatch)
    write_base(tmp_path / "toy")
    (tmp_path / "pictures").mkdir()
    for index, (caption, colour) in enumerate(zip(CAPTIONS, COLOURS, strict=True)):
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[:, 16 * index : 16 * index + 32] = colour
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text(caption)
    return tmp_path


def job_of(folder: Path, name: str = "toy-run", **lora: Any) -> Job:
    spec = {
        "name": name,
        "model": {"base": "toy"},
        "data": {"source": "pictures", "resolution": 64, "center_crop": True},
        "lora": {"rank": RANK, "layers": "all", **lora},
        "train": {"steps": STEPS, "batch_size": 2, "lr": LR},
        "schedule": {"name": "constant"},
        "checkpoint": {"every": 8},
        "validate": {"prompts": ["a red square"], "steps": 3, "size": 64},
    }
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(spec))
    (folder / "runs").mkdir(exist_ok=True)
    [job] = prepare_jobs([path], folder / "runs", fetch=False, fresh=False)
    return job


def train(job: Job, stop_after: int | None = None) -> ExitCode:
    """As the queue's worker process does. stop_after: ask it to stop after so many steps."""
    steps = 0

    def send(event: Any) -> None:
        nonlocal steps
        steps += event["kind"] == "step"

    attempt = claim_run(job.run, job.spec, job.plan, "test")
    stop: Any = lambda: stop_after is not None and steps >= stop_after  # noqa: E731
    code = train_run(TrainRequest(job.run.folder, attempt), "cpu", send, stop, WorkerState())
    job.run.release()
    return code


def exported(job: Job) -> dict[str, Tensor]:
    return load_file(job.run.export / "pytorch_lora_weights.safetensors")


def test_it_trains_and_exports_under_its_own_layer_names(folder: Path) -> None:
    job = job_of(folder)
    assert train(job) == ExitCode.DONE
    state = job.run.state()
    assert state.state == "done"
    [encode, *_] = job.plan.phases
    assert encode.encoders == ("words",)  # type: ignore[union-attr]
    (out, inside), (out2, inside2) = linear_layers({"width": WIDTH, "hidden": HIDDEN}).values()
    assert {name: tuple(value.shape) for name, value in exported(job).items()} == {
        "transformer.first.lora_A.weight": (RANK, inside),
        "transformer.first.lora_B.weight": (out, RANK),
        "transformer.second.lora_A.weight": (RANK, inside2),
        "transformer.second.lora_B.weight": (out2, RANK),
    }
    assert {name.removesuffix(".weight") for name in load_file(job.run.export / "toy-run.safetensors")} == {
        f"lora_unet_{matrix}.{end}" for matrix in ("layer_in", "layer_out") for end in ("lora_down", "lora_up", "alpha")
    }
    assert (state.export_errors or {}).keys() == {"pytorch_lora_weights.safetensors", "toy-run.safetensors"}
    before, after = (Image.open(job.run.samples / f"step-{step:06d}-0.png") for step in (0, STEPS))
    assert np.asarray(before).tolist() != np.asarray(after).tolist()  # drawn with the adapter that was read back
    losses = [loss for _, loss in newest(job).scalars["meters"]["curve"]]
    assert losses[-1] < 0.9 * losses[0]


def newest(job: Job) -> Checkpoint:
    [(_, path), *_] = job.run.checkpoint_files()
    return storage.read(path)


def test_an_interrupted_run_goes_on_to_the_same_bytes(folder: Path) -> None:
    whole, broken = job_of(folder, "whole"), job_of(folder, "broken")
    assert train(whole) == ExitCode.DONE
    assert train(broken, stop_after=13) == ExitCode.STOPPED
    assert not broken.run.export.exists()
    assert next(step for step, _ in broken.run.checkpoint_files()) == 13
    assert train(broken) == ExitCode.DONE
    name = "pytorch_lora_weights.safetensors"
    assert (broken.run.export / name).read_bytes() == (whole.run.export / name).read_bytes()
    for step in (0, STEPS):
        ours, theirs = (job.run.samples / f"step-{step:06d}-0.png" for job in (broken, whole))
        assert ours.read_bytes() == theirs.read_bytes()


def test_its_values_are_those_of_a_plain_loop(folder: Path) -> None:
    """Two matrices, their adapters and AdamW written out; from the loop under test come the noise and the order of the
    pictures alone, and the noisy images are checked against the pictures."""
    job = job_of(folder, alpha=4.0)
    assert train(job) == ExitCode.DONE
    objective = objective_of(job)
    weights = load_file(folder / "toy" / "transformer" / "diffusion_pytorch_model.safetensors")
    table = load_file(folder / "toy" / "words" / "model.safetensors")["table"]
    assert table.shape == (WORDS, WIDTH)
    adapters = first_adapters(job, objective)
    optimizer = torch.optim.AdamW(adapters.values(), LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    scale = 4.0 / RANK

    def layer(name: str, x: Tensor) -> Tensor:
        low = adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]
        return x @ (weights[f"{name}.weight"] + scale * low).t() + weights[f"{name}.bias"]

    for step in range(STEPS):
        made = objective.prepare(step, 0)
        noisy = made.noised
        for index, caption in enumerate(made.captions):
            clean = noisy.img[index] - noisy.sigmas[index] * noisy.target[index]  # x - sigma (eps - z) = z
            assert torch.allclose(clean, tokens_of(folder, caption), atol=1e-5)
        vec = torch.stack([table[word_ids(caption)].mean(0) for caption in made.captions])
        rest = torch.cat([vec, noisy.timesteps[:, None]], 1)[:, None].expand(-1, noisy.img.shape[1], -1)
        velocity = layer("second", layer("first", torch.cat([noisy.img, rest], 2)))
        loss = (velocity - noisy.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters.values(), 1.0)
        optimizer.step()
    trained, files = newest(job).weights.lora, exported(job)
    for name, value in adapters.items():
        assert torch.allclose(trained[name], value.detach(), rtol=1e-3, atol=1e-5), name
        wanted = trained[name] * (scale if ".lora_B." in name else 1)  # the file's readers need no alpha
        assert torch.equal(files[f"transformer.{name}"], wanted.to(torch.bfloat16)), name


def objective_of(job: Job) -> FlowObjective:
    cache = Cache(job.run.runs / "cache")
    assert job.pictures is not None
    base = open_base(job.spec, torch.device("cpu"), cache)
    context = RunContext(job.spec, job.plan, job.pictures, base, cache, EventLog(), Ranks(), lambda: False)
    return FlowObjective(
        context, context.family.load_transformer(base), {"words": CachedEncoder(context, "words", Weights())}
    )


def first_adapters(job: Job, objective: FlowObjective) -> dict[str, Tensor]:
    parameters = lora.attach_lora(objective.transformer, lora_shape(job.spec, objective.context.base), job.spec.seed)
    assert all(not value.any() for name, value in parameters.items() if ".lora_B." in name)
    return {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}


def tokens_of(folder: Path, caption: str) -> Tensor:
    """The picture with this caption, as the transformer sees it: [64, 3]."""
    pixels = np.asarray(Image.open(folder / "pictures" / f"{CAPTIONS.index(caption)}.png"), np.float64)
    squares = pixels.reshape(8, 8, 8, 8, 3).mean((1, 3)).reshape(64, 3)
    return torch.tensor((squares / 127.5 - 1 - SHIFT) * SCALING, dtype=torch.float32)


def test_a_base_of_no_known_family_is_refused(folder: Path) -> None:
    shutil.copytree(folder / "toy", folder / "other")
    path = folder / "other" / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(FluxrunError, match="one of: FluxTransformer2DModel"):
        architecture_of({"_class_name": "UNet2DConditionModel"})
    (folder / "toy").rename(folder / "away")
    (folder / "other").rename(folder / "toy")
    wanted = r"toy-run\.toml:\d+: model\.base: fluxrun cannot .*got 'UNet2DConditionModel'.*ToyTransformer \(toy\)"
    with pytest.raises(SpecError, match=wanted):
        job_of(folder)
