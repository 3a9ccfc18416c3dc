"""Every key of a spec does what it says: each is changed, and something that is not the spec must change with it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from runner.base.files import BUILTIN
from runner.data import tokens
from runner.jobs.prepare import prepare_jobs
from runner.model import base as bases
from runner.model import device
from runner.model.flux1 import transformer
from runner.plan.phases import trained_encoders, trains_lora
from runner.spec.keys import spec_keys
from runner.training.adapter_shapes import lora_shape
from runner.training.context import RunContext
from runner.training.live_encoder import LiveEncoder
from runner.training.phases.train import build_optimizer, build_schedule, load_transformer
from tests.support.house import House
from tests.support.objectives import jolt, objective_of
from tests.support.paths import PROJECT
from tests.support.runs import context_of

TABLES: dict[str, Any] = {
    "model": {"base": "builtin:tiny", "max_sequence_length": 32},
    "data": {"source": "pictures", "resolution": 64, "center_crop": True},
    "lora": {"rank": 4},
    "train": {"steps": 8, "batch_size": 2},
}
TOKENS = {"tokens": [{"name": "TOK"}]}
PRIOR = {"prior": {"images": "classes", "prompt": "a red circle", "count": 2}, "validate": {"steps": 2}}


def put(tables: dict[str, Any], dotted: str, value: Any) -> None:
    *folders, last = dotted.split(".")
    for folder in folders:
        tables = tables.setdefault(folder, {})
    tables[last] = value


def write(house: House, **values: Any) -> Path:
    """The least spec with values by dotted key (a double underscore for the dot)."""
    tables = copy.deepcopy(TABLES)
    for key, value in values.items():
        put(tables, key.replace("__", "."), copy.deepcopy(value))
    return house.write("a.toml", tomli_w.dumps(tables))


Probe = Callable[[RunContext], Any]


def step_loss(context: RunContext) -> float:
    """The loss at one drawn batch, with an adapter that has some effect."""
    objective, kinds = objective_of(context)
    jolt(kinds)
    return float(objective.loss(2, 0).detach())


def transformer_of(context: RunContext) -> Any:
    phase = context.plan.training[0]
    return load_transformer(context, phase, past())[0]


def past() -> Any:
    from runner.checkpoint.storage import Weights

    return Weights()


def settings(context: RunContext, kind: str, name: str) -> Any:
    """What the torch optimizer was built with, for one group."""
    _, kinds = objective_of(context)
    built = build_optimizer(context.spec, kinds)
    at = [index for index, group in enumerate(built.groups) if next(iter(group.parameters)).startswith(f"{kind}/")]
    return built.torch.param_groups[at[0]][name]


def optimizer(name: str, index: int | None = None) -> Probe:
    return lambda context: settings(context, "lora", name) if index is None else settings(context, "lora", name)[index]


def factor(context: RunContext) -> list[float]:
    schedule = build_schedule(context)
    return [round(schedule(step), 6) for step in range(8)]


def first_rows(context: RunContext) -> Any:
    objective, _ = objective_of(context)
    live = objective.encoders["clip"]
    assert isinstance(live, LiveEncoder)
    assert live.rows is not None
    return live.rows.detach().clone()


def shown(context: RunContext) -> list[Any]:
    """What training sees in its first steps."""
    objective, _ = objective_of(context)
    return [
        (view.picture.name, view.size, view.variant, caption)
        for step in range(12)
        for view, caption in objective.batch(step, 0)
    ]


def tf32_allowed(context: RunContext) -> bool:
    device.prepare_device(torch.device("cpu"), tf32=context.spec.model.tf32)
    allowed: bool = torch.backends.cuda.matmul.allow_tf32
    return allowed


def class_images(context: RunContext) -> list[bytes]:
    from runner.training.phases.prior import prior_phase

    prior_phase(context)
    assert context.spec.prior is not None
    return [path.read_bytes() for path in sorted(Path(context.spec.prior.images).glob("*.png"))]


def with_class_images(context: RunContext) -> float:
    class_images(context)
    return step_loss(context)


def pixels(context: RunContext) -> list[bytes]:
    return [found.tobytes() for _, found in context.pixels(context.views)]


def spans(context: RunContext) -> list[tuple[str, int, int]]:
    return [(phase.name, phase.start, phase.stop) for phase in context.plan.training]


def note(context: RunContext, key: str) -> Any:
    """Where a value that only a whole run or another machine shows is tested."""
    del context
    return ELSEWHERE[key]


NOW = object()  # any value but the default's
# key -> (value, probe, what the probe shall give with it, other values the key needs)
TABLE: dict[str, tuple[Any, Probe, Any, dict[str, Any]]] = {
    "name": ("other", lambda d: d.plan.name, "other", {}),
    "seed": (7, step_loss, NOW, {}),
    "model.base": (
        "base", lambda d: d.base.folder.name, "base", {},
    ),
    "model.dtype": ("bf16", lambda d: next(transformer_of(d).parameters()).dtype, torch.bfloat16, {}),
    "model.gradient_checkpointing": (True, lambda d: transformer_of(d).gradient_checkpointing, True, {}),
    "model.offload": (
        "blocks", lambda d: "forward" in vars(transformer_of(d).transformer_blocks[0]), True, {},
    ),
    "model.attention": (
        "_native_math",
        lambda d: transformer_of(d).transformer_blocks[0].attn.processor._attention_backend.value, "_native_math", {},
    ),
    "model.compile": (
        True, lambda d: transformer_of(d).transformer_blocks[0]._compiled_call_impl is not None, True, {},
    ),
    "model.tf32": (
        False,
        tf32_allowed, False, {},
    ),
    "model.max_sequence_length": (
        16, lambda d: objective_of(d)[0].embed_prompts([d.captions[0]], "diffusers").txt.shape[1], 16, {},
    ),
    "data.source": ("others", lambda d: len(d.pictures.items), 2, {}),
    "data.prompt": ("a thing", lambda d: d.captions[-1], "a thing", {"data__source": "bare"}),
    "data.caption_column": ("text", lambda d: d.captions[0], "one", {"data__source": "listed"}),
    "data.image_column": ("other", lambda d: d.pictures.items[0].name, "02.png", {"data__source": "listed"}),
    "data.repeats": (3, lambda d: len({epoch for _, epoch in _epochs(d)}), NOW, {}),
    "data.resolution": (
        [64, 32], lambda d: sorted(d.pictures_by_size), [(32, 32), (64, 64)], {"validate__size": 64},
    ),
    "data.buckets": (True, lambda d: d.plan.sizes, {(48, 80): 1, (64, 64): 8, (80, 48): 1}, {"data__source": "shapes"}),
    "data.center_crop": (True, pixels, NOW, {"data__center_crop": False, "data__source": "shapes"}),
    "data.random_flip": (True, pixels, NOW, {}),
    "data.variants": (3, lambda d: len(d.views), 30 + 9, {"data__center_crop": False}),
    "data.interpolation": ("nearest", pixels, NOW, {"data__resolution": 48}),
    "data.caption_dropout": (1.0, lambda d: {caption for *_, caption in shown(d)}, {""}, {}),
    "data.holdout": (4, lambda d: (len(d.pictures.items), len(d.eval_views)), (6, 4), {}),
    "prior.images": ("classes2", lambda d: (class_images(d), Path(d.spec.prior.images).name)[1], "classes2", PRIOR),  # type: ignore[union-attr]
    "prior.prompt": ("a blue star", class_images, NOW, PRIOR),
    "prior.count": (3, lambda d: len(class_images(d)), 3, PRIOR),
    "prior.weight": (0.25, with_class_images, NOW, PRIOR),
    "prior.dtype": ("bf16", class_images, NOW, PRIOR),
    "tokens.name": ("creature", lambda d: tokens.expand_placeholders(d.captions[0], d.plan.placeholders),
        "a TOK and a <s0><s1>", {"data__source": "named", **TOKENS}),
    "tokens.vectors": (3, lambda d: d.vocabulary_entries, ["<s0>", "<s1>", "<s2>"], TOKENS),
    "tokens.initializer": ("red heart", first_rows, NOW, TOKENS),
    "tokens.placeholder": ("bird", lambda d: d.vocabulary_entries, ["<bird0>", "<bird1>"], TOKENS),
    "inversion.encoders": (["clip", "t5"], lambda d: trained_encoders(d.plan.training[0], "token rows"), ("clip", "t5"), TOKENS),
    "inversion.until": (0.25, spans, [("joint", 0, 2), ("lora", 2, 8)], TOKENS),
    "inversion.lr": (0.5, lambda d: settings(d, "rows", "lr"), 0.5, TOKENS),
    "inversion.weight_decay": (0.5, lambda d: settings(d, "rows", "weight_decay"), 0.5, TOKENS),
    "inversion.gradient_checkpointing": (
        3, lambda d: [block.save_activations for block in transformer.blocks_of(transformer_of(d))], [True, False, False] * 2, TOKENS,
    ),
    "inversion.pooling": ("eos", step_loss, NOW, {**TOKENS, "model__base": "legacy"}),
    "lora.rank": (2, lambda d: next(iter(objective_of(d)[1]["lora"].values())).shape[0], 2, {}),
    "lora.alpha": (8.0, step_loss, NOW, {}),
    "lora.dropout": (0.9, step_loss, NOW, {}),
    "lora.layers": (["attn.to_q"], lambda d: {name.split(".attn.")[-1] for name in lora_shape(d.spec, d.base).layers}, {"to_q"}, {}),
    "lora.until": (0.25, spans, [("joint", 0, 2), ("inversion", 2, 4)], TOKENS),
    "text_lora.rank": (2, lambda d: d.plan.training[0].trains[0].parameters, 2 * 2 * 4 * 2 * 64, {"text_lora": {"rank": 4}}),
    "text_lora.alpha": (64.0, step_loss, NOW, {"text_lora": {"rank": 4}}),
    "text_lora.until": (0.25, spans, [("joint", 0, 2), ("lora", 2, 8)], {"text_lora": {"rank": 4}}),
    "text_lora.lr": (0.5, lambda d: settings(d, "text_lora", "lr"), 0.5, {"text_lora": {"rank": 4}}),
    "train.steps": (5, lambda d: d.plan.steps, 5, {}),
    "train.epochs": (2, lambda d: d.plan.steps, 10, {"train": {"batch_size": 2}}),
    "train.batch_size": (3, lambda d: len(objective_of(d)[0].batch(0, 0)), 3, {}),
    "train.accumulate": (3, lambda d: d.plan.steps, 2, {"train": {"batch_size": 2, "epochs": 1}}),
    "train.lr": (0.5, optimizer("lr"), 0.5, {}),
    "train.scale_lr": (True, optimizer("lr"), 2e-4, {}),
    "train.guidance": (1.0, step_loss, NOW, {}),
    "train.weighting.scheme": ("cosmap", step_loss, NOW, {}),
    "train.weighting.mean": (2.0, step_loss, NOW, {"train__weighting": {"scheme": "logit_normal"}}),
    "train.weighting.std": (0.1, step_loss, NOW, {"train__weighting": {"scheme": "logit_normal"}}),
    "train.weighting.scale": (0.1, step_loss, NOW, {"train__weighting": {"scheme": "mode"}}),
    "optimizer.name": ("prodigy", lambda d: type(_optimizer(d).torch).__name__, "Prodigy", {}),
    "optimizer.beta1": (0.5, optimizer("betas", 0), 0.5, {}),
    "optimizer.beta2": (0.5, optimizer("betas", 1), 0.5, {}),
    "optimizer.eps": (0.5, optimizer("eps"), 0.5, {}),
    "optimizer.weight_decay": (0.5, optimizer("weight_decay"), 0.5, {}),
    "optimizer.beta3": (0.5, optimizer("beta3"), 0.5, {"optimizer": {"name": "prodigy"}}),
    "optimizer.decouple": (False, optimizer("decouple"), False, {"optimizer": {"name": "prodigy"}}),
    "optimizer.bias_correction": (False, optimizer("use_bias_correction"), False, {"optimizer": {"name": "prodigy"}}),
    "optimizer.safeguard_warmup": (False, optimizer("safeguard_warmup"), False, {"optimizer": {"name": "prodigy"}}),
    "optimizer.d_coef": (2.0, optimizer("d_coef"), 2.0, {"optimizer": {"name": "prodigy"}}),
    "optimizer.d0": (0.5, optimizer("d0"), 0.5, {"optimizer": {"name": "prodigy"}}),
    "optimizer.growth_rate": (1.5, optimizer("growth_rate"), 1.5, {"optimizer": {"name": "prodigy"}}),
    "schedule.name": ("linear", factor, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125], {}),
    "schedule.warmup": (4, factor, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1], {"schedule": {"name": "constant_with_warmup"}}),
    "schedule.cycles": (2, factor, NOW, {"schedule": {"name": "cosine_with_restarts"}}),
    "schedule.power": (2.0, factor, NOW, {"schedule": {"name": "polynomial"}}),
}  # fmt: skip
# Keys that only a whole run, or another machine, shows: the test that holds each.
ELSEWHERE = {
    "model.quantize": "model/test_quantization.py::test_a_quantised_base_trains_close_to_the_plain_one",
    "model.revision": "training/test_spec_keys.py::test_a_revision_chooses_the_snapshot",
    "model.variant": "training/test_spec_keys.py::test_a_variant_chooses_the_weight_files",
    "data.config": "data/test_sources.py::test_configuration_and_split_select_rows",
    "data.split": "data/test_sources.py::test_configuration_and_split_select_rows",
    "data.workers": "training/test_spec_keys.py::test_workers_decode",
    "prior.batch_size": "training/test_spec_keys.py::test_class_images_come_in_batches",
    "train.max_grad_norm": "training/test_loop.py::test_gradients_are_clipped_over_what_is_trained",
    "checkpoint.every": "integration/test_run.py::test_a_pivotal_run_leaves_what_the_contract_names",
    "checkpoint.minutes": "training/test_loop.py::test_a_checkpoint_is_also_due_by_the_clock",
    "checkpoint.keep": "integration/test_run_features.py::test_only_the_newest_checkpoints_are_kept",
    "validate.prompts": "integration/test_run_features.py::test_pictures_while_training_change_nothing_of_it",
    "validate.every": "integration/test_run_features.py::test_pictures_while_training_change_nothing_of_it",
    "validate.count": "integration/test_run_features.py::test_pictures_while_training_change_nothing_of_it",
    "validate.steps": "integration/test_run_features.py::test_pictures_while_training_change_nothing_of_it",
    "validate.size": "integration/test_run_features.py::test_pictures_while_training_change_nothing_of_it",
    "validate.loss": "integration/test_run.py::test_a_run_without_an_eval_loss",
    "stop.no_better_for": "integration/test_run_features.py::test_a_run_that_ends_early_exports_its_best_step",
    "stop.loss_above": "training/test_loop.py::test_training_ends_early_by_rule",
    "stop.at": "training/test_loop.py::test_training_ends_early_by_rule",
    "export.best": "integration/test_run_features.py::test_a_run_that_ends_early_exports_its_best_step",
    "track.to": "tracking/test_trackers.py::test_weights_and_biases_gets_the_numbers",
    "export.dtype": "export/test_exports.py::test_another_dtype_exports_again_and_trains_nothing",
    "hub.push": "integration/test_hub_push.py::test_the_export_folder_is_pushed_as_it_is",
    "hub.repo": "integration/test_hub_push.py::test_the_export_folder_is_pushed_as_it_is",
    "hub.private": "integration/test_hub_push.py::test_the_export_folder_is_pushed_as_it_is",
    "notify.url": "core/test_notify.py::test_a_webhook_and_a_command_hear_of_every_run",
    "notify.command": "core/test_notify.py::test_a_webhook_and_a_command_hear_of_every_run",
    "compute.gpus": "integration/test_run_features.py::test_two_processes_train_one_run",
}


def _optimizer(context: RunContext) -> Any:
    _, kinds = objective_of(context)
    return build_optimizer(context.spec, kinds)


def _epochs(context: RunContext) -> list[tuple[int, int]]:
    from runner.data import buckets

    objective, _ = objective_of(context)
    drawn = [buckets.draw_batch(0, step, 0, images=2, accumulate=1, counts=objective.counts)[1] for step in range(15)]
    return [pair for batch in drawn for pair in batch]


@pytest.fixture
def stocked(house: House) -> House:
    """The house with the bases and data sets that the table names."""
    from PIL import Image

    pictures = house.folder / "pictures"
    for name in ("others", "bare", "listed", "named", "shapes"):
        shutil.copytree(pictures, house.folder / name)
    for path in [*(house.folder / "others").glob("*")]:
        if path.stem not in ("01", "02"):
            path.unlink()
    (house.folder / "bare" / "10.txt").unlink()
    for path in (house.folder / "listed").glob("*.txt"):
        path.unlink()
    rows = [{"file_name": "01.png", "other": "02.png", "text": "one", "text2": "two"}]
    (house.folder / "listed" / "metadata.jsonl").write_text(json.dumps(rows[0]))
    for path in (house.folder / "named").glob("*.txt"):
        path.write_text("a TOK and a creature")
    for name, size in (("03.png", (120, 72)), ("04.png", (72, 120))):
        path = house.folder / "shapes" / name
        Image.open(path).resize(size).save(path)
    for name in ("base", "legacy"):
        shutil.copytree(BUILTIN["builtin:tiny"], house.folder / name)
    config = house.folder / "legacy" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 2}))
    return house


# What the default needs where the least spec has no such thing.
FIRST: dict[str, dict[str, Any]] = {"data.prompt": {"data__prompt": "a filler"}, "data.caption_column": {"data__prompt": "x"},
         "data.image_column": {"data__prompt": "x"}, "train.epochs": {"train__steps": 8}}  # fmt: skip


@pytest.mark.parametrize("key", TABLE)
def test_a_key_does_what_it_says(stocked: House, key: str) -> None:
    value, probe, wanted, more = TABLE[key]
    table, _, name = key.partition(".")
    second = (
        {**more, "tokens": [{"name": "TOK", name: value}]}
        if table == "tokens"
        else {**more, key.replace(".", "__"): value}
    )
    if key in ("data.caption_column", "data.image_column"):
        second["data__prompt"] = "x"
    before = probe(context_of(write(stocked, **{**more, **FIRST.get(key, {})})))
    for folder in ("classes", "classes2"):
        shutil.rmtree(stocked.folder / folder, ignore_errors=True)
    after = probe(context_of(write(stocked, **second)))
    same = torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    assert not same, f"{key} changed nothing: {after}"
    if wanted is not NOW:
        assert after == wanted


def test_the_tables_name_every_key() -> None:
    tables = {"model", "data", "prior", "tokens", "inversion", "lora", "text_lora", "train", "train.weighting", "optimizer",
              "schedule", "checkpoint", "validate", "stop", "track", "export", "hub", "notify", "compute"}  # fmt: skip
    assert set(spec_keys()) - tables == set(TABLE) | set(ELSEWHERE)
    for place in ELSEWHERE.values():
        file, _, test = place.partition("::")
        assert f"def {test}(" in (PROJECT / "tests" / file).read_text(), place


# ---- the rest of this file's own ------------------------------------------------------------------------------------


def test_a_variant_chooses_the_weight_files(stocked: House) -> None:
    folder = stocked.folder / "base"
    for part in ("transformer", "vae"):
        path = folder / part / "diffusion_pytorch_model.safetensors"
        path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    for part in ("text_encoder", "text_encoder_2"):
        path = folder / part / "model.safetensors"
        path.rename(path.with_name("model.fp16.safetensors"))
    objective_of(context_of(write(stocked, model__base="base", model__variant="fp16")))
    with pytest.raises(OSError, match="no file named"):
        objective_of(context_of(write(stocked, model__base="base", lora__rank=2)))


def test_a_revision_chooses_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of the hub's own cache, off line."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--me--base"
    for number, revision in (("1" * 40, "main"), ("2" * 40, "other")):
        shutil.copytree(BUILTIN["builtin:tiny"], repo / "snapshots" / number)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(number)
    cpu = torch.device("cpu")
    found = [bases.open_base("me/base", revision, None, cpu, torch.float32).folder.name for revision in (None, "other")]
    assert found == ["1" * 40, "2" * 40]


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_decode(stocked: House, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.data import images
    from runner.training import context

    asked: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count: int, **more: Any) -> None:
            asked.append(count)
            super().__init__(count, **more)

    monkeypatch.setattr(context, "ThreadPoolExecutor", Pool)
    found = context_of(write(stocked, data__workers=workers))
    made = [(view, cut.tobytes()) for view, cut in found.pixels(found.views)]
    assert asked == [max(1, workers)]
    by_picture = [view for picture in found.pictures.items for view in found.views if view.picture == picture]
    assert [view for view, _ in made] == by_picture  # each is decoded once, for all its views
    for view, cut in made:
        upright = images.decode(view.picture)
        wanted = images.cropped_pixels(
            upright, view.picture.name, view.size, variant=view.variant, variants=found.variants, center=True, flip=False,
            interpolation="lanczos", seed=0,
        )  # fmt: skip
        assert cut == wanted.tobytes()


def test_class_images_come_in_batches(stocked: House, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.model.flux1.pipeline import Flux1ImagePipeline

    sizes: list[int] = []
    real = Flux1ImagePipeline.draw

    def counted(pipe: Any, prompt: Any, seeds: Any, **more: Any) -> Any:
        sizes.append(len(seeds))
        return real(pipe, prompt, seeds, **more)

    monkeypatch.setattr(Flux1ImagePipeline, "draw", counted)
    context = context_of(write(stocked, **{**PRIOR, "prior__count": 5, "prior__batch_size": 2}))
    assert len(class_images(context)) == 5
    assert sizes == [2, 2, 1]
    # topped up, by whatever run comes next
    (stocked.folder / "classes" / "class-00001.png").unlink()
    assert len(class_images(context)) == 5
    assert sizes == [2, 2, 1, 1]


def test_class_images_are_as_large_as_training_whatever_validation_looks_at(stocked: House) -> None:
    from PIL import Image

    more = {**PRIOR, "prior__count": 1, "data__resolution": [32, 64]}
    made = []
    for size, steps in ((16, 1), (48, 3)):
        shutil.rmtree(stocked.folder / "classes", ignore_errors=True)
        context = context_of(write(stocked, **{**more, "validate__size": size, "validate__steps": steps}))
        made += class_images(context)
        with Image.open(stocked.folder / "classes" / "class-00000.png") as image:
            assert image.size == (64, 64)
    assert made[0] == made[1]


def test_a_class_folder_remembers_its_prompt(stocked: House) -> None:
    class_images(context_of(write(stocked, **PRIOR)))
    said = stocked.fluxrun("plan", write(stocked, **{**PRIOR, "prior__prompt": "a blue star"}))
    assert said.code == 2
    assert "prior.prompt: " in said.err
    assert "holds images of the prompt 'a red circle', got 'a blue star'" in said.err


def test_a_held_out_share_of_everything_is_refused(stocked: House) -> None:
    said = stocked.fluxrun("plan", write(stocked, data__holdout=10))
    assert said.code == 2
    assert "data.holdout: leaves nothing to train on (found 10, there are 10 images); lower it" in said.err


def test_the_phases_of_every_combination(stocked: House) -> None:
    found = {}
    combinations: dict[str, dict[str, Any]] = {
        "clip lora": {"text_lora": {"rank": 4}},
        "clip lora stops first": {"text_lora": {"rank": 4, "until": 0.5}},
        "clip lora stops last": {"text_lora": {"rank": 4}, "lora__until": 0.5},
        "prior": PRIOR,
        "prior, pivotal": {**PRIOR, **TOKENS},
        "inversion goes on": {**TOKENS, "lora__until": 0.5, "inversion__until": 1.0},
    }
    for name, more in combinations.items():
        [job] = prepare_jobs([write(stocked, **more)], stocked.folder / "runs", fetch=True, fresh=False)
        found[name] = [phase.name for phase in job.plan.phases]
        assert all(
            trains_lora(phase) or trained_encoders(phase, "token rows") or trained_encoders(phase, "text lora")
            for phase in job.plan.training
        )
    assert found == {
        "clip lora": ["encode", "joint", "export"],
        "clip lora stops first": ["encode", "joint", "encode-learned", "lora", "export"],
        "clip lora stops last": ["encode", "joint", "text-lora", "export"],
        "prior": ["prior", "encode", "lora", "export"],
        "prior, pivotal": ["prior", "encode", "joint", "encode-learned", "lora", "export"],
        "inversion goes on": ["encode", "joint", "inversion", "export"],
    }
