"""The mechanisms under a run, each against an independent statement of what it must do."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from runner.base.files import BUILTIN, fingerprint
from runner.base.layers import FLUX1, linear_layers, lora_layers
from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint, Weights
from runner.core import files, locks
from runner.core.errors import BadFileError, LockHeldError
from runner.core.seeds import derive
from runner.data import tokens
from runner.model import base, flow_matching, lora, tensors
from runner.model.flux1 import loading, text_encoders
from runner.model.flux1.latents import LatentScale, draw_latents, image_ids, pack
from runner.model.flux1.transformer import PromptEmbeds, predictor
from runner.runs import checkpoint_files
from runner.spec.schema import Token
from runner.training import optimizers

BASE = base.Base(BUILTIN["builtin:tiny"], None, torch.device("cpu"), torch.float32)


# ---- files ---------------------------------------------------------------------------------------------------------


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3, 5).bfloat16(),
        "full": torch.randn(2, 3, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }


def test_our_safetensors_are_everyones_and_repeatable(tmp_path: Path) -> None:
    made = some_tensors()
    for name in ("a", "b"):
        tensors.save(tmp_path / name, made, {"z": "1", "a": "2", "m": "3"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    stock = load_file(tmp_path / "a")
    assert stock.keys() == made.keys()
    assert all(torch.equal(stock[name], made[name]) and stock[name].dtype == made[name].dtype for name in made)
    with safe_open(tmp_path / "a", framework="pt") as opened:
        assert {"z": "1", "a": "2", "m": "3"}.items() <= opened.metadata().items()


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / checkpoint_files.checkpoint_name(7)
    storage.write(
        path, Checkpoint("joint", "key", 7, Weights({"a": torch.randn(8, 8)}), {"a/exp_avg": torch.randn(8)}, {"n": 1})
    )
    whole = path.read_bytes()
    assert storage.read(path).step == 7
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(BadFileError):
            storage.read(path)
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadFileError):
            storage.read(path)


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / checkpoint_files.checkpoint_name(7)
    storage.write(path, Checkpoint("lora", "key", 7, Weights(), {}, {}))
    path.rename(tmp_path / checkpoint_files.checkpoint_name(8))
    with pytest.raises(BadFileError, match="the header says step 7"):
        storage.read(tmp_path / checkpoint_files.checkpoint_name(8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": None},
        {"step": "seven"},
        {"scalars": "{"},
        {"scalars": "[" * 100_000},
        {"phase": None},
        {"phase_key": None},
    ],
    ids=["no step", "a step in words", "half of JSON", "deep JSON", "no phase", "no key"],
)
def test_a_whole_file_with_a_faulty_header_is_refused(tmp_path: Path, wrong: dict[str, str | None]) -> None:
    """Its digest is right: what wrote it was wrong."""
    header = {
        "format": str(storage.FORMAT),
        "phase": "lora",
        "phase_key": "key",
        "step": "7",
        "scalars": "{}",
        **wrong,
    }
    path = tmp_path / checkpoint_files.checkpoint_name(7)
    tensors.save(path, {}, {name: value for name, value in header.items() if value is not None})
    with pytest.raises(BadFileError, match="the header is incomplete"):
        storage.read(path)


def test_a_checkpoints_bytes_do_not_depend_on_the_order_of_its_scalars(tmp_path: Path) -> None:
    written = []
    for scalars in ({"a": 1, "b": 2}, {"b": 2, "a": 1}):
        storage.write(tmp_path / "x", Checkpoint("lora", "key", 7, Weights(), {}, scalars))
        written.append((tmp_path / "x").read_bytes())
    assert written[0] == written[1]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    files.write_text(path, "old")

    def broken() -> list[bytes]:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_bytes(path, (broken() for _ in range(1)))  # type: ignore[misc]
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]
    for stale in (".state.json.7.partial", ".export.partial/x"):  # of a process that was killed
        (tmp_path / stale).parent.mkdir(exist_ok=True)
        (tmp_path / stale).write_text("half")
    files.remove_partial_files(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_a_lock_has_one_holder_and_dies_with_it(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    code = (
        f"import time\nfrom pathlib import Path\nfrom runner.core import locks\nwith locks.locked(Path({str(lock)!r})):\n"
        "    print(1, flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PROJECT)}
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    assert locks.is_locked(lock)
    with (
        pytest.raises(LockHeldError, match=f"process {holder.pid} is working on it"),
        locks.hold_lock(lock, patience=0),
    ):
        pass
    holder.kill()
    holder.wait()
    assert not locks.is_locked(lock)
    with locks.hold_lock(lock, patience=0):
        pass


# ---- tokens and text -----------------------------------------------------------------------------------------------


def test_tokens_are_replaced_as_whole_words_longest_first() -> None:
    known = tokens.placeholders([Token(name="TOK"), Token(name="TOK2", vectors=1)])
    assert (
        tokens.expand_placeholders("a TOK, TOK2's TOKYO and (TOK)", known) == "a <s0><s1>, <s2>'s TOKYO and (<s0><s1>)"
    )
    assert tokens.tokens_in_caption("TOKYO and TOK2", known) == {"TOK2"}
    assert tokens.expand_placeholders("a TOK", ()) == "a TOK"


def encoders() -> list[tuple[str, nn.Module, object]]:
    return [
        ("clip", loading.load_clip(BASE), loading.load_tokenizer(BASE, "clip")),
        ("t5", loading.load_t5(BASE), loading.load_tokenizer(BASE, "t5")),
    ]


@pytest.mark.parametrize("learned", [(), ("clip",), ("clip", "t5")], ids=["frozen", "clip", "clip+t5"])
@pytest.mark.parametrize(
    "prompt", ["a red heart", "a <s0><s1> icon, on a <s0><s1>!", "a b c " * 60], ids=["plain", "tokens", "long"]
)
def test_our_embeddings_are_the_pipelines_to_the_bit(learned: tuple[str, ...], prompt: str) -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(BASE.folder, transformer=None, vae=None, dtype=torch.float32)
    ours = {}
    for name, model, tokenizer in encoders():
        generator = torch.Generator().manual_seed(1)
        if name in learned:
            width = model.get_input_embeddings().weight.shape[1]
            rows = torch.randn(2, width, generator=generator)
            text_encoders.attach_token_rows(model, tokenizer, ["<s0>", "<s1>"], nn.Parameter(rows))
            parts = (pipe.text_encoder, pipe.tokenizer) if name == "clip" else (pipe.text_encoder_2, pipe.tokenizer_2)
            pipe.load_textual_inversion(rows, token=["<s0>", "<s1>"], text_encoder=parts[0], tokenizer=parts[1])
        with torch.no_grad():
            if name == "clip":
                ours[name] = text_encoders.clip_pooled(model, text_encoders.clip_ids(tokenizer, prompt)[None], None)
            else:
                ours[name] = text_encoders.t5_states(model, text_encoders.t5_ids(tokenizer, prompt, 32)[None])
    with torch.no_grad():
        txt, vec, _ = pipe.encode_prompt(prompt, None, max_sequence_length=32)
    assert torch.equal(ours["clip"], vec)
    assert torch.equal(ours["t5"], txt)


def test_only_the_rows_get_a_gradient() -> None:
    for _, model, tokenizer in encoders():
        model.requires_grad_(False)
        rows = nn.Parameter(torch.randn(2, model.get_input_embeddings().weight.shape[1]))
        text_encoders.attach_token_rows(model, tokenizer, ["<s0>", "<s1>"], rows)
        ids = text_encoders.t5_ids(tokenizer, "a <s0>", 16)
        model(ids[None])[0].square().sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
            name for name, parameter in model.named_parameters() if parameter is rows
        ]
        assert rows.grad is not None
        assert rows.grad[0].abs().sum() > 0  # <s0> was read
        assert rows.grad[1].abs().sum() == 0  # <s1> was not


def test_rows_start_at_the_tables_scale_or_at_a_phrase() -> None:
    for name, model, tokenizer in encoders():
        random_rows = text_encoders.initial_rows(model, tokenizer, [(64, None)], 0, name)
        assert math.isclose(float(random_rows.std()), text_encoders.table_std(model), rel_tol=0.1)
        assert torch.equal(random_rows, text_encoders.initial_rows(model, tokenizer, [(64, None)], 0, name))
        assert not torch.equal(random_rows, text_encoders.initial_rows(model, tokenizer, [(64, None)], 1, name))
        from_phrase = text_encoders.initial_rows(model, tokenizer, [(3, "red heart")], 0, name)
        ids = tokenizer("red heart", add_special_tokens=False).input_ids
        assert len(ids) == 2
        assert torch.equal(from_phrase[:2], model.get_input_embeddings().weight[ids].detach())
        assert torch.equal(from_phrase[2:], text_encoders.initial_rows(model, tokenizer, [(3, None)], 0, name)[2:])


def test_the_rescale_is_the_references() -> None:
    rows = torch.randn(4, 8) * 3
    wanted = rows * (0.5 / rows.std()) ** 0.1
    text_encoders.keep_std(rows, 0.5)
    assert torch.allclose(rows, wanted)


# ---- the objective -------------------------------------------------------------------------------------------------


def test_packing_is_the_pipelines() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 6, 8)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 8))
    ids = image_ids(6, 8, torch.device("cpu"), torch.float32)
    assert torch.equal(ids, FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_the_loss_is_the_references_formula(scheme: str) -> None:
    """Written here from the definition: x = (1 - s) z + s e, target e - z, weighted mean square."""
    flow = flow_matching.Flow(BASE, flow_matching.Weighting(scheme))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 16, 8, 8, generator=generator)
    indices = flow.draw(3, generator)
    noised = flow.noise(latents, indices, torch.Generator().manual_seed(5))
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    transformer = loading.load_transformer(BASE)
    read = PromptEmbeds(torch.randn(3, 16, 96), torch.randn(3, 64))
    with torch.no_grad():
        predicted = predictor(transformer, 3.5, BASE.device, BASE.dtype)(noised, read, 8, 8)
        loss = flow.errors(predicted, noised).mean()

    t = 1000 - indices  # the schedule is 1000, 999, .. 1, unshifted since FLUX shifts by resolution at inference only
    sigma = (t / 1000).view(-1, 1, 1, 1)
    mixed = (1 - sigma) * latents + sigma * eps
    assert torch.allclose(pack(mixed), noised.img, atol=1e-6)
    packed = transformer(
        hidden_states=pack(mixed), timestep=t / 1000, guidance=torch.full((3,), 3.5), pooled_projections=read.vec,
        encoder_hidden_states=read.txt, txt_ids=torch.zeros(16, 3), img_ids=image_ids(8, 8, BASE.device, torch.float32),
    ).sample  # fmt: skip
    unpacked = packed.view(3, 4, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 16, 8, 8)
    weight = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))}.get(
        scheme, torch.ones_like(sigma)
    )
    wanted = (weight * (unpacked - (eps - latents)) ** 2).reshape(3, -1).mean(1).mean()
    assert abs(float(wanted.detach()) - float(loss)) <= 1e-6 * max(1.0, float(loss))


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_timesteps_and_weights_are_those_of_diffusers_helpers(scheme: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

    flow = flow_matching.Flow(BASE, flow_matching.Weighting(scheme, mean=0.4, std=0.6, scale=0.8))
    drawn = flow.draw(2000, torch.Generator().manual_seed(7))
    u = compute_density_for_timestep_sampling(
        scheme, 2000, logit_mean=0.4, logit_std=0.6, mode_scale=0.8, generator=torch.Generator().manual_seed(7)
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(BASE.folder, subfolder="scheduler")
    assert torch.equal(flow.timesteps[drawn], scheduler.timesteps[(u * 1000).long()])
    plain = torch.rand(2000, generator=torch.Generator().manual_seed(7))
    shaped = scheme in ("logit_normal", "mode")
    assert torch.equal(drawn, (plain * 1000).long()) != shaped  # its own numbers count where it has any

    noised = flow.noise(torch.zeros(2000, 16, 2, 2), drawn, torch.Generator().manual_seed(1))
    weights = compute_loss_weighting_for_sd3(scheme, scheduler.sigmas[drawn])
    assert torch.allclose(flow.errors(noised.target + 1, noised), weights.float(), rtol=1e-4)


def test_latents_are_drawn_from_the_vaes_posterior() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(2, 32, 4, 4)
    scale = LatentScale(0.1, 0.3)
    drawn = draw_latents(moments, scale, torch.Generator().manual_seed(3))
    wanted = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(3))
    assert torch.allclose(drawn, (wanted - 0.1) * 0.3, atol=1e-6)


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tiny", "FLUX.1-dev"])
def test_layer_shapes_are_the_models(which: str) -> None:
    from diffusers import FluxTransformer2DModel

    config = (
        {**FLUX1, "guidance_embeds": True}
        if which != "tiny"
        else json.loads((BASE.folder / "transformer/config.json").read_text())
    )
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    real = {name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linear_layers(config) == real


def test_presets_and_suffixes_choose_the_named_layers() -> None:
    layers = linear_layers({**FLUX1, "guidance_embeds": True})
    count = {name: len(lora_layers(layers, name)) for name in ("attention", "attention+mlp", "all")}
    assert count == {"attention": 19 * 4 + 38 * 3, "attention+mlp": 19 * 12 + 38 * 3, "all": 19 * 14 + 38 * 6}
    assert "proj_out" not in lora_layers(layers, "all")
    assert list(lora_layers(layers, ("single_transformer_blocks.3.attn.to_q",))) == [
        "single_transformer_blocks.3.attn.to_q"
    ]
    assert not lora_layers(layers, ("to_qq",))


def test_adapters_start_at_the_base_and_from_the_seed() -> None:
    shape = lora.LoraShape(4, 8.0, 0.0, ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp"))
    first = lora.attach_lora(loading.load_transformer(BASE), shape, 0)
    again = lora.attach_lora(loading.load_transformer(BASE), shape, 0)
    other = lora.attach_lora(loading.load_transformer(BASE), shape, 1)
    assert list(first) == [f"{layer}.lora_{part}.weight" for layer in shape.layers for part in "AB"]
    for name, parameter in first.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, again[name])
        if ".lora_A." in name:
            assert math.isclose(float(parameter.std()), 1 / 4, rel_tol=0.15)
            assert not torch.equal(parameter, other[name])
        else:
            assert not parameter.any()


# ---- optimizers and schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers",
    [
        optimizers.Adam(0.9, 0.99, 1e-8),
        optimizers.ProdigyNumbers(0.9, 0.99, None, 1e-8, True, True, True, 1.0, 1e-6, None),
    ],
    ids=["adamw", "prodigy"],
)
def test_an_optimizer_goes_on_as_if_never_stopped(
    numbers: optimizers.Adam | optimizers.ProdigyNumbers, tmp_path: Path
) -> None:
    lr = 1.0 if isinstance(numbers, optimizers.ProdigyNumbers) else 1e-2

    def build() -> tuple[dict[str, nn.Parameter], optimizers.Optimizer]:
        torch.manual_seed(0)
        # a zero parameter, as LoRA's B: Prodigy keeps a 0-dim state for it
        named = {
            "lora/a": nn.Parameter(torch.randn(3, 2)),
            "lora/b": nn.Parameter(torch.zeros(2, 3)),
            "rows/t5": nn.Parameter(torch.randn(4)),
        }
        groups = [
            optimizers.ParameterGroup({name: named[name] for name in ("lora/a", "lora/b")}, lr, 0.01),
            optimizers.ParameterGroup({"rows/t5": named["rows/t5"]}, lr, 0.1),
        ]
        return named, optimizers.Optimizer(groups, numbers)

    def advance(named: dict[str, nn.Parameter], optimizer: optimizers.Optimizer, steps: range) -> None:
        """Gradients that mostly point one way, so that Prodigy's estimate d grows in every step."""
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in named.values():
                parameter.grad = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
            optimizer.step(1.0 - step / 100)

    unbroken, unbroken_optimizer = build()
    advance(unbroken, unbroken_optimizer, range(12))
    named, optimizer = build()
    advance(named, optimizer, range(5))
    kept, scalars = optimizer.state()
    tensors.save(tmp_path / "state", kept, {"scalars": json.dumps(scalars)})
    loaded, header = tensors.load(tmp_path / "state")
    resumed, again = build()
    for name, parameter in resumed.items():
        parameter.data.copy_(named[name].data)
    again.restore(loaded, json.loads(header["scalars"]))
    if isinstance(numbers, optimizers.ProdigyNumbers):
        first, then = numbers.d0, scalars["shared"]["d"]
        assert first < then < unbroken_optimizer.torch.param_groups[0]["d"]
    advance(resumed, again, range(5, 12))
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert again.state()[1] == unbroken_optimizer.state()[1]


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_a_schedule_is_diffusers_as_a_function_of_the_step(name: str) -> None:
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    numbers = {"num_warmup_steps": 3, "num_training_steps": 20, "num_cycles": 2, "power": 2.0}
    stepped = get_scheduler(name, optimizer, **numbers)
    factor = optimizers.schedule(name, warmup=3, steps=20, cycles=2, power=2.0)
    for step in range(20):
        assert factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        stepped.step()


def test_seeds_are_distinct_and_stable() -> None:
    assert derive(0, "noise", 1, 2) == derive(0, "noise", 1, 2)
    assert (
        len(
            {
                derive(seed, what, a, b)
                for seed in (0, 1)
                for what in ("noise", "dropout")
                for a in range(5)
                for b in range(5)
            }
        )
        == 100
    )
    assert derive(0, "a", 11) != derive(0, "a1", 1)


def test_a_fine_tune_of_the_base_has_another_fingerprint(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(BASE.folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(BASE.folder)
    weights = tmp_path / "copy" / "transformer" / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert fingerprint(tmp_path / "copy") != fingerprint(BASE.folder)


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_a_checkpoint_at_t5_xxls_size_holds_rows_not_tables(name: str, tmp_path: Path) -> None:
    """Two rows of T5-XXL are 8,192 numbers, its table 131,596,288: what is saved follows the rows."""
    numbers: optimizers.Adam | optimizers.ProdigyNumbers = optimizers.Adam(0.9, 0.99, 1e-8)
    if name == "prodigy":
        numbers = optimizers.ProdigyNumbers(0.9, 0.99, None, 1e-8, True, True, True, 1.0, 1e-6, None)
    table = nn.Embedding(32128, 4096, dtype=torch.bfloat16, _weight=torch.zeros(32128, 4096, dtype=torch.bfloat16))
    table.requires_grad_(False)
    rows = nn.Parameter(torch.randn(2, 4096))
    embedding = text_encoders.TokenRows(table, 32100, rows)
    optimizer = optimizers.Optimizer([optimizers.ParameterGroup({"rows/t5": rows}, 1e-2, 0.0)], numbers)
    for _ in range(2):
        embedding(torch.tensor([[5, 32100, 32101, 1]])).float().square().sum().backward()
        optimizer.step(1.0)
    kept, scalars = optimizer.state()
    path = tmp_path / checkpoint_files.checkpoint_name(2)
    storage.write(
        path, Checkpoint("inversion", "key", 2, Weights(rows={"t5": rows.detach()}), kept, {"optimizer": scalars})
    )
    size = path.stat().st_size
    assert 3 * rows.numel() * 4 < size < 6 * rows.numel() * 4
    assert size < table.weight.numel() * 2 / 1000
