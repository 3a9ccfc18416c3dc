"""What training minimises: against the formula written out here, and what of the model gets a gradient."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runner.base.files import BUILTIN
from runner.cache import keys
from runner.checkpoint.storage import Weights
from runner.core.errors import FluxrunError
from runner.core.seeds import derive
from runner.data import images, tokens
from runner.data.buckets import CropView
from runner.model import flow_matching
from runner.model.flux1 import loading, text_encoders
from runner.model.flux1.latents import encode_image, latent_scale, pack
from runner.training.context import EVAL_SIGMAS, RunContext
from runner.training.encoders import CachedEncoder, encode_texts
from runner.training.live_encoder import LiveEncoder
from runner.training.objective import FlowObjective, PreparedBatch
from tests.support.house import House
from tests.support.objectives import jolt, objective_of, spec_of
from tests.support.runs import context_of

KINDS = {
    "lora": {"drop": "tokens"},
    "pivotal": {},
    "pivotal clip": {"encoders": 'encoders = ["clip"]'},
    "inversion": {"rank": "until = 0"},
    "text lora": {"drop": "tokens", "add": "[text_lora]\nrank = 2\n"},
}


def draws(context: RunContext, micro: int, place: int, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(latents, sigma, noise) of one picture, drawn as the design says: posterior, timestep, noise, from one
    generator."""
    generator = torch.Generator().manual_seed(derive(context.spec.seed, "noise", 3, micro * 2 + place))
    mean, logvar = moments.chunk(2)
    posterior = torch.randn((1, *mean.shape), generator=generator)
    config = json.loads((context.base.folder / "vae" / "config.json").read_text())
    z = (mean + (0.5 * logvar).exp() * posterior[0] - config["shift_factor"]) * config["scaling_factor"]
    u = torch.rand(1, generator=generator)
    sigma = 1 - (u * 1000).long() / 1000  # the schedule is 1000, 999, ... 1 of 1000
    return z, sigma, torch.randn((1, *mean.shape), generator=generator)[0]


def patches(latents: Tensor) -> Tensor:
    """[16, 8, 8] -> [16 tokens, 64], written out."""
    return torch.stack(
        [latents[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(-1) for r in range(4) for c in range(4)]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_references_and_gradients_reach_what_the_plan_says(house: House, kind: str) -> None:
    context = context_of(spec_of(house, **KINDS[kind]))
    objective, kinds = objective_of(context)
    jolt(kinds)
    shown = objective.batch(3, 0)
    loss = objective.loss(3, 0)

    parts = [draws(context, 0, place, objective.moments[view]) for place, (view, _) in enumerate(shown)]
    z, sigma, eps = (torch.stack(list(column)) for column in zip(*parts, strict=True))
    x = (1 - sigma.view(-1, 1, 1, 1)) * z + sigma.view(-1, 1, 1, 1) * eps
    captions = [caption for _, caption in shown]
    with torch.no_grad():
        txt, vec = plain_embeddings(context, captions, objective)
        predicted = objective.transformer(
            hidden_states=torch.stack([patches(one) for one in x]), timestep=sigma.flatten(), guidance=torch.full((2,), 3.5),
            pooled_projections=vec, encoder_hidden_states=txt, txt_ids=torch.zeros(32, 3),
            img_ids=torch.tensor([[0.0, r, c] for r in range(4) for c in range(4)]), return_dict=False,
        )[0]  # fmt: skip
    target = torch.stack([patches(one) for one in eps - z])
    wanted = (predicted - target).square().flatten(1).mean(1).mean()
    assert abs(float(loss.detach()) - float(wanted)) <= 1e-6 * float(wanted)

    loss.backward()
    learning = {id(value) for group in kinds.values() for value in group.values()}
    modules = [
        objective.transformer,
        *(one.model for one in objective.encoders.values() if isinstance(one, LiveEncoder)),
    ]
    reached = {id(p) for module in modules for p in module.parameters() if p.grad is not None and p.grad.any()}
    assert reached == learning
    told = {part.what: part.parameters for part in context.plan.training[0].trains}
    names = {"lora": "lora", "rows": "token rows", "text_lora": "text lora"}
    counted = {names[k]: sum(p.numel() for p in group.values()) for k, group in kinds.items() if group}
    assert counted == told


def plain_embeddings(context: RunContext, captions: list[str], objective: FlowObjective) -> tuple[Tensor, Tensor]:
    """By the stock pipeline, with the same rows or adapter put in."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(context.base.folder, transformer=None, vae=None, dtype=torch.float32)
    clip, t5 = objective.encoders["clip"], objective.encoders["t5"]
    for live, encoder, tokenizer in ((clip, "text_encoder", "tokenizer"), (t5, "text_encoder_2", "tokenizer_2")):
        if isinstance(live, LiveEncoder) and live.rows is not None:
            where = {"text_encoder": getattr(pipe, encoder), "tokenizer": getattr(pipe, tokenizer)}
            pipe.load_textual_inversion(live.rows.detach(), token=context.vocabulary_entries, **where)
        if isinstance(live, LiveEncoder) and live.adapter:
            pipe.text_encoder = live.model
    written = [tokens.expand_placeholders(caption, context.plan.placeholders) for caption in captions]
    txt, vec, _ = pipe.encode_prompt(written, None, max_sequence_length=32)
    return txt, vec


@pytest.mark.parametrize("again", ["", "gradient_checkpointing = true"])
def test_a_caption_of_several_pictures_is_read_once(house: House, again: str) -> None:
    """Its rows' gradient is the sum of what comes back from all of them."""
    objective, _ = objective_of(context_of(spec_of(house, encoders=f'encoders = ["clip", "t5"]\n{again}')))
    for name in ("clip", "t5"):
        live = objective.encoders[name]
        assert isinstance(live, LiveEncoder)
        assert live.rows is not None
        one, other = list(live.ids)[:2]
        read: list[int] = []
        live.model.register_forward_pre_hook(lambda _, inputs, read=read: read.append(len(inputs[0])))
        found = []
        for captions in ([other, one, other, other], [other], [one], [other], [other]):
            out = live.embed(captions, "diffusers")
            found.append(out)
        assert read[:5] == [2, 1, 1, 1, 1]
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(found[0].shape, generator=generator)
        apart = torch.cat(found[1:])
        torch.testing.assert_close(found[0], apart, rtol=1e-4, atol=1e-5)
        grads: list[torch.Tensor] = []
        for out in (found[0], apart):
            live.rows.grad = None
            (out * weights).sum().backward()
            assert live.rows.grad is not None
            grads.append(live.rows.grad)
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
        assert grads[0].any()


def test_two_micro_batches_are_one_large_batch(house: House) -> None:
    small = context_of(spec_of(house, batch_size="batch_size = 2\naccumulate = 2"))
    large = context_of(spec_of(house, batch_size="batch_size = 4"))
    gradients = []
    for context in (small, large):
        objective, kinds = objective_of(context)
        jolt(kinds)
        for micro in range(context.spec.train.accumulate):
            (objective.loss(5, micro) / context.spec.train.accumulate).backward()
        gradients.append({name: p.grad for group in kinds.values() for name, p in group.items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None
        other = gradients[1][name]
        assert other is not None
        assert torch.allclose(gradient, other, atol=1e-6, rtol=1e-4), name


def test_picture_and_caption_never_part(house: House) -> None:
    """Whatever is drawn in any order, at any size and crop: its latents are those of the picture the caption is
    beside."""
    for index, side in ((2, (96, 64)), (5, (64, 96))):
        from PIL import Image

        path = house.folder / "pictures" / f"{index:02d}.png"
        Image.open(path).resize(side).save(path)
    spec = spec_of(house, center_crop="random_flip = true\nbuckets = true\nvariants = 3")
    context = context_of(spec)
    objective, _ = objective_of(context)
    beside = {path.stem: path.read_text().strip() for path in (house.folder / "pictures").glob("*.txt")}
    vae = loading.load_vae(context.base)
    seen = set()
    for step in range(30):
        for view, caption in objective.batch(step, 0):
            assert caption == beside[Path(view.picture.name).stem]
            if view in seen:
                continue
            seen.add(view)
            [(_, pixels)] = context.pixels([view])
            moments = encode_image(vae, torch.from_numpy(pixels.copy()).permute(2, 0, 1))
            assert torch.equal(objective.moments[view], moments)
            assert moments.shape[1:] == (view.size[1] // 8, view.size[0] // 8)
    assert len({view.size for view in seen}) == 3
    assert len(seen) == 30  # ten pictures, three variants each


def test_an_fp16_base_still_encodes_its_pictures_in_fp32(house: House) -> None:
    """FLUX's VAE overflows in fp16, here on one picture of ten: its latents, and so the eval loss, were no numbers."""
    half = context_of(spec_of(house, base='base = "builtin:tiny"\ndtype = "fp16"', drop="tokens"))
    objective, _ = objective_of(half)
    assert all(torch.isfinite(torch.tensor(list(objective.evaluate().values()))))
    full = context_of(spec_of(house, drop="tokens"))
    assert list(full.latent_keys.values()) == list(half.latent_keys.values())
    assert half.base.dtype == torch.float16


def test_a_token_behind_what_the_encoder_reads_is_told(house: House) -> None:
    for path in (house.folder / "pictures").glob("*.txt"):
        path.write_text("a heart on a hill " * 20 + f"and a TOK, {path.stem}")
    with pytest.raises(FluxrunError, match="TOK lies behind the 77 tokens that clip reads in 10 of the 10 captions"):
        objective_of(context_of(spec_of(house)))
    (house.folder / "pictures" / "01.txt").write_text("a TOK")
    context = context_of(spec_of(house))
    told: list[str] = []
    object.__setattr__(context.event_log, "message", told.append)
    objective_of(context)
    assert [line.split(" that name it")[0] for line in told if "lies behind" in line] == [
        f"TOK lies behind the {length} tokens that {encoder} reads in 9 of the 10 captions"
        for encoder, length in (("clip", 77), ("t5", 32))
    ]


def test_an_initializer_longer_than_its_vectors_is_told(house: House) -> None:
    context = context_of(spec_of(house, name='name = "TOK"\ninitializer = "a red heart"'))
    told: list[str] = []
    object.__setattr__(context.event_log, "message", told.append)
    objective_of(context)
    assert [line for line in told if "initializer" in line] == [
        f"tokens.initializer 'a red heart' has 3 pieces in {encoder}: its first 2 are used; tokens.vectors = 3 would use all"
        for encoder in ("clip", "t5")
    ]


def test_a_live_encoder_is_never_replaced_by_the_cache(house: House) -> None:
    context = context_of(spec_of(house, encoders='encoders = ["clip"]'))
    objective, _ = objective_of(context)
    assert isinstance(objective.encoders["clip"], LiveEncoder)
    assert isinstance(objective.encoders["t5"], CachedEncoder)
    assert not (context.cache.folder / "clip").exists()
    texts = (
        len(context.pictures.captions) + 2
    )  # the prompt as it stands, for the untuned base, and with its token written out
    assert len(list((context.cache.folder / "t5").rglob("*.safetensors"))) == texts == 12


def test_rows_learned_otherwise_are_another_cache_entry(house: House) -> None:
    context = context_of(spec_of(house))
    keys = {
        context.text_key("clip", "a TOK", "diffusers", Weights(rows={"clip": torch.full((2, 64), value)}))
        for value in (1.0, 2.0)
    }
    keys.add(context.text_key("clip", "a TOK", "eos", Weights(rows={"clip": torch.full((2, 64), 1.0)})))
    keys.add(context.text_key("clip", "a TOK", "diffusers", Weights()))
    assert len(keys) == 4


def test_a_dropped_caption_is_the_empty_one_in_its_share(house: House) -> None:
    context = context_of(spec_of(house, center_crop="center_crop = true\ncaption_dropout = 0.25"))
    objective, _ = objective_of(context)
    captions = [caption for step in range(500) for _, caption in objective.batch(step, 0)]
    assert 0.2 < captions.count("") / len(captions) < 0.3
    again = [caption for step in range(500) for _, caption in objective.batch(step, 0)]
    assert again == captions
    assert torch.isfinite(objective.loss(captions.index("") // 2, 0))


# ---- CLIP's pooled vector --------------------------------------------------------------------------------------------


@pytest.fixture
def legacy_base(tmp_path: Path) -> Path:
    """The tiny base with FLUX.1-dev's `eos_token_id = 2`, which pools at the highest id."""
    folder = tmp_path / "base"
    shutil.copytree(BUILTIN["builtin:tiny"], folder)
    config = folder / "text_encoder" / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps({**facts, "eos_token_id": 2}))
    return folder


@pytest.mark.parametrize("pooling", ["diffusers", "eos", "both"])
def test_where_clip_is_pooled_is_as_the_spec_says(house: House, legacy_base: Path, pooling: str) -> None:
    spec = spec_of(house, base=f'base = "{legacy_base}"', encoders=f'encoders = ["clip"]\npooling = "{pooling}"')
    context = context_of(spec)
    objective, _ = objective_of(context)
    live = objective.encoders["clip"]
    assert isinstance(live, LiveEncoder)
    first, second = "a TOK on a white background in the middle", "a TOK on a black background at the top"
    live.ids |= {
        caption: text_encoders.clip_ids(live.tokenizer, tokens.expand_placeholders(caption, context.plan.placeholders))
        for caption in (first, second)
    }
    with torch.no_grad():
        at_token = live.embed([first, second], "diffusers")
        at_end = live.embed([first, second], "eos")
        ids = torch.stack([live.ids[first], live.ids[second]])
        states = live.model(ids).last_hidden_state
    assert torch.equal(at_token[0], at_token[1])  # defect v: what follows the trigger is invisible there
    assert not torch.equal(at_end[0], at_end[1])
    eos = live.tokenizer.eos_token_id
    ends = [row.tolist().index(eos) for row in ids]
    assert torch.equal(at_end, torch.stack([states[i, end] for i, end in enumerate(ends)]))
    used = [objective._pooling(step, 0) for step in range(40)]
    assert set(used) == ({"diffusers", "eos"} if pooling == "both" else {pooling})
    if pooling == "both":
        assert 10 < used.count("eos") < 30
    losses = {}
    for way in ("diffusers", "eos"):
        step = used.index(way) if way in used else None
        if step is not None:
            losses[way] = float(objective.loss(step, 0).detach())
            vec = objective.embed_prompts([caption for _, caption in objective.batch(step, 0)], way).vec
            assert torch.equal(vec, live.embed([caption for _, caption in objective.batch(step, 0)], way))
    assert losses
    past = Weights(rows={"clip": live.rows.detach()} if live.rows is not None else {})
    encode_texts(context, "clip", past, context.entries("clip", past))
    cached = CachedEncoder(context, "clip", past)
    for way in keys.poolings(context.spec, context.encoders["clip"]):
        with torch.no_grad():
            caption = context.captions[0]
            assert torch.equal(cached.embed([caption], way), live.embed([caption], way))


# ---- prior preservation ----------------------------------------------------------------------------------------------


PRIOR = '[prior]\nimages = "classes"\nprompt = "a red circle"\ncount = 3\nweight = 0.5\n'


@pytest.mark.parametrize("kind", ["pivotal", "lora"])
@pytest.mark.parametrize("buckets", [False, True])
def test_class_images_share_the_batch_and_are_weighed(house: House, kind: str, buckets: bool) -> None:
    from runner.training.phases.prior import prior_phase

    changes = {**KINDS[kind], "add": PRIOR}
    if buckets:
        changes["center_crop"] = "center_crop = true\nbuckets = true"
    context = context_of(spec_of(house, **changes))
    prior_phase(context)
    objective, kinds = objective_of(context)
    jolt(kinds)
    shown = objective.batch(0, 0)
    assert [caption == "a red circle" for _, caption in shown] == [False, False, True, True]
    assert all(view.picture.name.startswith("class/") == (caption == "a red circle") for view, caption in shown)
    assert len({view.size for view, _ in shown}) == 1
    both = objective.loss(0, 0)
    assert context.spec.prior is not None
    alone = context.spec.model_copy(update={"prior": context.spec.prior.model_copy(update={"weight": 0.0})})
    object.__setattr__(context, "spec", alone)
    instance = objective.loss(0, 0)
    bare = context.spec.model_copy(update={"prior": None})
    object.__setattr__(context, "spec", bare)
    assert torch.isclose(objective.loss(0, 0), instance, rtol=1e-5)
    assert both > instance


# ---- the eval loss ---------------------------------------------------------------------------------------------------


def test_the_eval_loss_is_fixed_by_the_pictures_alone(house: House) -> None:
    def evaluated(seed: int = 0, **changes: str) -> tuple[RunContext, dict[float, float]]:
        spec = spec_of(house, drop="tokens", **changes)
        spec.write_text(f"seed = {seed}\n{spec.read_text()}")
        context = context_of(spec)
        return context, objective_of(context)[0].evaluate()

    held = "center_crop = true\nholdout = 3"
    context, first = evaluated(center_crop=held)
    assert tuple(first) == EVAL_SIGMAS
    assert len(context.eval_views) == 3
    objective, _ = objective_of(context)
    trained = {view.picture.name for step in range(40) for view, _ in objective.batch(step, 0)}
    assert len(trained) == 7
    assert trained.isdisjoint(view.picture.name for view in context.eval_views)
    # neither seed nor batch size nor weighting move it: an untrained LoRA is the base
    _, second = evaluated(center_crop=held, batch_size='batch_size = 5\nweighting.scheme = "cosmap"')
    assert first == pytest.approx(second, rel=1e-5)
    _, seeded = evaluated(7, center_crop="random_flip = true\nholdout = 3", steps="steps = 9")
    assert first == pytest.approx(seeded, rel=1e-5)

    view = context.eval_views[1]
    object.__setattr__(context, "eval_views", (view,))
    scale = latent_scale(context.base)
    z = (objective.moments[view].chunk(2)[0][None] - scale.shift) * scale.scaling
    generator = torch.Generator().manual_seed(derive(0, "eval", view.picture.name, "0.3"))
    eps = torch.randn(z.shape, generator=generator)
    with torch.no_grad():
        read = objective.embed_prompts([view.picture.caption], "diffusers")
        noised = flow_matching.NoisyBatch(
            pack(0.7 * z + 0.3 * eps), pack(eps - z), torch.tensor([[[0.3]]]), torch.tensor([0.3])
        )
        wanted = (objective.predict(noised, read, 8, 8) - noised.target).square().mean()
    assert objective.evaluate()[0.3] == pytest.approx(float(wanted), rel=1e-5)


def test_with_nothing_held_out_some_training_pictures_are_looked_at(house: House) -> None:
    context = context_of(spec_of(house))
    assert [view.picture.name for view in context.eval_views] == [f"{index:02d}.png" for index in range(1, 10)]
    assert [sigmas for _, sigmas in context.eval_points] == [
        (sigma,) for sigma in EVAL_SIGMAS
    ]  # a look costs nine forwards
    assert all(view.variant is None for view in context.eval_views)
    assert isinstance(context.eval_views[0], CropView)
    assert isinstance(context.pictures, images.Pictures)


def test_batches_made_ahead_are_the_same_batches(house: House) -> None:
    """As on a GPU, where a thread makes the next one while the device computes."""
    losses = []
    for in_thread in (False, True):
        objective, _ = objective_of(
            context_of(spec_of(house, rank="rank = 4\ndropout = 0.1", steps="steps = 6\naccumulate = 2"))
        )
        objective.prefetcher.in_thread = in_thread
        losses.append([float(objective.loss(step, micro)) for step in range(3) for micro in range(2)])
        objective.close()
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6


def test_a_batch_made_ahead_is_the_next_one_asked_for(house: House) -> None:
    """Across micro-batches and steps: none is made twice, or in vain but behind the last one."""
    objective, _ = objective_of(context_of(spec_of(house, steps="steps = 6\naccumulate = 2")))
    made: list[tuple[int, int]] = []

    def note(step: int, micro: int) -> PreparedBatch:
        made.append((step, micro))
        return objective.prepare(step, micro)

    objective.prefetcher.make, objective.prefetcher.in_thread = note, True
    for step in range(3):
        for micro in range(2):
            objective.loss(step, micro)
    objective.close()
    assert made == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
