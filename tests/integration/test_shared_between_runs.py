"""What the runs of one queue share: the transformer that stays, one pass of encoding, the cache; and that none of it
shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from runner.checkpoint.storage import Weights
from runner.data import sources
from runner.data.buckets import CropView
from runner.data.images import DataError
from runner.model import lora
from runner.model.base import Base
from runner.model.flux1 import latents, loading, transformer
from runner.training.adapter_shapes import lora_shape
from runner.training.context import RunContext
from runner.training.live_encoder import LiveEncoder
from runner.training.model_pool import ModelPool
from tests.support.house import House
from tests.support.runs import context_of

PROMPTS = 'prompts = ["a red heart"]'


def plain(house: House, name: str, **changes: str) -> Path:
    """Without tokens: LoRA alone."""
    path = house.spec(name, **changes)
    text = path.read_text()
    path.write_text(text[: text.index("[[tokens]]")] + text[text.index("[lora]") :])
    return path


def exports(house: House, run: str) -> dict[str, bytes]:
    folder = house.folder / "runs" / run / "export"
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(found) >= 3
    return found


def pools(monkeypatch: pytest.MonkeyPatch) -> list[ModelPool]:
    """Every pool that a model is taken from, from now on; once per time."""
    seen: list[ModelPool] = []
    real = ModelPool.acquire

    def take(self: ModelPool, *what: Any) -> Any:
        seen.append(self)
        return real(self, *what)

    monkeypatch.setattr(ModelPool, "acquire", take)
    return seen


def loads(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Every base that `flux.NAME` loads a part of from now on."""
    seen: list[Any] = []
    real = getattr(loading, name)

    def load(base: Any) -> Any:
        seen.append(base)
        return real(base)

    monkeypatch.setattr(loading, name, load)
    return seen


def test_a_warm_worker_leaves_no_trace_of_the_run_before(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of unlike shape one after the other on one transformer, and each alone: the same bytes."""
    first = house.spec("a", rank="rank = 8\ndropout = 0.5", base='base = "builtin:tiny"\ngradient_checkpointing = true')
    second = house.spec("b", encoders='encoders = ["clip"]', prompts=PROMPTS, rank="rank = 2")
    loaded = loads(monkeypatch, "load_transformer")
    assert house.fluxrun("queue", first, second).code == 0
    assert len(loaded) == 1  # for two runs, each with a pivot and an export
    together = {name: exports(house, name) for name in ("a", "b")}
    for name, spec in (("b", second), ("a", first)):
        (house.folder / "runs").rename(house.folder / f"runs-before-{name}")
        assert house.fluxrun("queue", spec).code == 0
        assert exports(house, name) == together[name]


def test_an_adapter_that_was_taken_out_leaves_the_very_layers_that_were_there(house: House) -> None:
    context = context_of(plain(house, "a"))
    model = loading.load_transformer(context.base)
    before, attributes = list(model.named_modules()), set(vars(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = lora.attach_lora(model, lora_shape(context.spec, context.base), 0)
    assert [name for name, _ in model.named_modules()] != [name for name, _ in before]
    lora.detach_lora(model)
    assert all(one is other for (_, one), (_, other) in zip(model.named_modules(), before, strict=True))
    assert set(vars(model)) == attributes
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)
    lora.attach_lora(model, lora_shape(context.spec, context.base), 0)  # and there is room for the next one
    assert adapter.keys() == lora.adapter_parameters(model).keys()


def test_another_base_or_dtype_is_another_transformer(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loads(monkeypatch, "load_transformer")
    context, model_pool = context_of(house.spec("a")), ModelPool()
    own = context.spec.model
    one = model_pool.acquire(context.base)
    model_pool.release(context.base, own, one)
    assert model_pool.bytes > 1_000_000
    assert model_pool.acquire(context.base) is one
    assert model_pool.bytes == 0  # lent, and so gone if it does not come back
    assert model_pool.acquire(context.base) is not one
    model_pool.release(context.base, own, one)
    half = Base(context.base.folder, None, context.base.device, torch.bfloat16)
    assert next(model_pool.acquire(half).parameters()).dtype == torch.bfloat16
    assert model_pool.bytes == 0
    assert len(loaded) == 3


def test_t5_is_loaded_once_for_the_whole_queue(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four runs with captions of their own; exports draw prompts, which T5 has read before, too."""
    clip = 'encoders = ["clip"]'
    texts = ("a TOK", "a TOK at night", "the TOK", "my TOK", "a painting of TOK")
    specs = [
        house.spec(f"run{number}", encoders=clip, source=f'source = "pictures"\nprompt = "{text}"')
        for number, text in enumerate(texts[:4])
    ]
    for caption in (house.folder / "pictures").glob("*.txt"):
        caption.unlink()
    loaded = loads(monkeypatch, "load_t5")
    said = house.fluxrun("queue", *specs)
    assert said.code == 0
    assert len(loaded) == 1
    assert "encode: t5 embeddings of 3 texts for runs that come later" in said.err
    late = house.spec("late", encoders=clip, source=f'source = "pictures"\nprompt = "{texts[4]}"')
    assert house.fluxrun("queue", late, *specs).code == 0
    assert len(loaded) == 2


def test_what_is_wrong_with_a_later_run_is_not_this_one_s_affair(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = 'encoders = ["clip"]'
    house.spec("a", encoders=clip)
    (house.folder / "others").mkdir()
    for picture in (house.folder / "pictures").iterdir():
        (house.folder / "others" / picture.name).write_bytes(picture.read_bytes())
    house.spec("b", encoders=clip, source='source = "others"')
    real = sources.read_source

    def read(source: Any) -> Any:
        own = house.folder / "runs" / "a"
        if source.text.endswith("others") and (own / "run.log").exists() and not (own / "export").exists():  # a trains
            raise DataError("a file is gone")
        return real(source)

    monkeypatch.setattr(sources, "read_source", read)
    assert house.fluxrun("queue", "a.toml", "b.toml").code == 0
    assert "the captions of b are not encoded ahead: a file is gone" in (house.folder / "runs/a/run.log").read_text()


def test_a_data_set_is_decoded_once_and_again_when_it_changed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[CropView] = []
    real = RunContext.pixels

    def pixels(self: RunContext, views: Sequence[CropView]) -> Any:
        decoded.extend(views)
        return real(self, views)

    monkeypatch.setattr(RunContext, "pixels", pixels)
    crop = "random_flip = true\nvariants = 2"
    plain(house, "a", center_crop=crop)
    assert house.fluxrun("queue", "a.toml").code == 0
    first = len(decoded)
    assert first >= 20
    plain(house, "b", center_crop=crop, rank="rank = 2")
    assert house.fluxrun("queue", "b.toml").code == 0
    assert len(decoded) == first
    plain(house, "c", center_crop=crop, rank="rank = 2").write_text(
        "seed = 5\n" + (house.folder / "c.toml").read_text()
    )
    assert house.fluxrun("queue", "c.toml").code == 0
    assert len(decoded) > first  # another seed crops and mirrors other ones
    second = len(decoded)
    (house.folder / "pictures" / "01.png").write_bytes((house.folder / "pictures" / "02.png").read_bytes())
    plain(house, "d", center_crop=crop, rank="rank = 2")
    assert house.fluxrun("queue", "d.toml").code == 0
    assert len(decoded) > second
    for note in (house.folder / "runs" / "cache" / "views").rglob("*.json"):  # torn by a power cut
        note.write_text(note.read_text()[:20])
    plain(house, "e", center_crop=crop, rank="rank = 3")
    assert house.fluxrun("queue", "e.toml").code == 0


def test_t5_and_vae_stay_away_where_nothing_is_missing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = 'encoders = ["clip"]'
    house.spec("a", encoders=clip)
    assert house.fluxrun("queue", "a.toml").code == 0
    gone = [loads(monkeypatch, name) for name in ("load_t5", "load_vae")]
    house.spec("b", encoders=clip, steps="steps = 4")
    assert house.fluxrun("queue", "b.toml").code == 0
    assert gone == [[], []]


def test_a_kept_transformer_makes_room_for_an_encoder(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a phase does not need is in memory: T5 and VAE are not loaded beside a transformer kept for
    later."""
    held: list[int] = []
    shelves = pools(monkeypatch)

    def noting(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def load(base: Any) -> Any:
            held.append(sum(model_pool.bytes for model_pool in shelves))
            return real(base)

        return load

    for name in ("load_t5", "load_vae"):
        monkeypatch.setattr(loading, name, noting(getattr(loading, name)))
    plain(house, "a")
    plain(house, "b", resolution="resolution = 96")
    assert house.fluxrun("queue", "a.toml", "b.toml").code == 0
    assert len(held) == 3
    assert held == [0, 0, 0]
    assert any(model_pool.bytes for model_pool in shelves)


def test_the_encoders_read_the_same_alone_and_for_others(house: House) -> None:
    context = context_of(house.spec("a"))
    live = LiveEncoder.load(context, "t5", Weights())
    entries = context.entries("t5", Weights())
    for caption in context.captions:
        key = context.text_key("t5", caption, "diffusers", Weights())
        with torch.no_grad():
            assert torch.equal(live.embed_entry(entries[key]), live.embed([caption], "diffusers")[0])


def test_a_worker_whose_memory_did_not_come_back_is_replaced(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.engine import worker_main
    from runner.model import device

    state = worker_main.WorkerState()
    levels = iter([500 << 20, 600 << 20, 900 << 20])
    monkeypatch.setattr(device, "memory_in_use", lambda where: next(levels))
    assert [state.has_leaked("cpu") for _ in range(3)] == [False, False, True]


def test_state_tells_time_and_peak_of_every_phase(house: House) -> None:
    house.spec("a")
    assert house.fluxrun("queue", "a.toml").code == 0
    state = json.loads(Path(house.folder / "runs" / "a" / "state.json").read_text())
    assert list(state["phases"]) == ["encode", "encode-learned", "export", "joint", "lora"]
    assert all(one["seconds"] >= 0 and one["peak_memory_bytes"] > 2**27 for one in state["phases"].values())
    assert state["peak_memory_bytes"] == max(one["peak_memory_bytes"] for one in state["phases"].values())


def test_the_plan_says_what_the_cache_has(house: House) -> None:
    clip = 'encoders = ["clip"]'
    house.spec("a", encoders=clip)
    before = house.fluxrun("plan", "a.toml")
    assert "in the cache: latents 0 of 10, t5 0 of 12; 224 KiB to make" in before.out
    assert not (house.folder / "runs").exists()
    assert house.fluxrun("queue", "a.toml").code == 0
    assert "in the cache: latents 10 of 10, t5 12 of 12; nothing to make" in house.fluxrun("plan", "a.toml").out
    house.spec("b", encoders=clip, source='source = "pictures"\ncaption_dropout = 0.1')  # which reads the empty caption
    told = json.loads(house.fluxrun("plan", "b.toml", "--json").out)["runs"][0]["cache"]
    assert told == {
        "latents": {"there": 10, "missing": 0, "bytes": 0},
        "t5": {"there": 12, "missing": 1, "bytes": 32 * 96 * 4},
    }
    assert house.fluxrun("queue", "b.toml").code == 0
    made = {
        kind: sum(1 for _ in (house.folder / "runs/cache" / kind).rglob("*.safetensors")) for kind in ("latents", "t5")
    }
    assert made == {"latents": 10, "t5": 13}


def test_the_plan_of_a_base_on_the_hub_says_nothing_of_the_cache(house: House) -> None:
    house.spec("a", base='base = "black-forest-labs/FLUX.1-dev"')
    assert "in the cache" not in house.fluxrun("plan", "a.toml").out


def test_what_has_just_learned_encodes_the_captions(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the pivot T5 is there already; and what it makes of the captions is what a loaded one makes of them."""
    seen = loads(monkeypatch, "load_t5")
    house.spec("a")
    assert house.fluxrun("queue", "a.toml").code == 0
    assert len(seen) == 2  # to learn, and to read the exported rows back
    together = exports(house, "a")
    (house.folder / "runs").rename(house.folder / "runs-before")
    monkeypatch.setattr(LiveEncoder, "matches", lambda self, weights: False)
    assert house.fluxrun("queue", "a.toml").code == 0
    assert len(seen) == 2 + 3
    assert exports(house, "a") == together


def test_an_encoder_that_learned_on_is_not_taken_for_an_older_one(house: House) -> None:
    context = context_of(house.spec("a"))
    live = LiveEncoder.load(context, "clip", Weights(), learn_rows=True)
    assert live.rows is not None
    then = Weights(rows={"clip": live.rows.detach().clone()})
    assert live.matches(then)
    assert not live.matches(Weights())
    with torch.no_grad():
        live.rows[0, 0] += 1e-6
    assert not live.matches(then)


def test_rotary_tables_are_kept_only_while_the_shape_is_told(house: House) -> None:
    model: FluxTransformer2DModel = loading.load_transformer(context_of(house.spec("a")).base)
    small, large = (latents.image_ids(side, side, torch.device("cpu"), torch.float32) for side in (4, 8))
    with transformer.rotary_tables_for(model, (0, 4, 4)):
        first = model.pos_embed(small)
        assert model.pos_embed(small) is first
    assert all(torch.equal(*pair) for pair in zip(model.pos_embed(small), first, strict=True))
    assert model.pos_embed(large)[0].shape[0] == 16  # stock diffusers, at another size
    transformer.clear_rotary_tables(model)
    with transformer.rotary_tables_for(model, (0, 4, 4)):
        assert model.pos_embed(small) is not first


def test_encoders_that_learned_to_the_end_are_gone_when_the_export_loads_its_own(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the rows learn to the last step, no encode phase comes between; two T5s would not fit beside the
    transformer."""
    shelves = pools(monkeypatch)
    held: list[int] = []
    load_t5 = loading.load_t5

    def load(base: Any) -> Any:
        held.append(sum(len(one.live_encoders) for one in shelves))
        return load_t5(base)

    monkeypatch.setattr(loading, "load_t5", load)
    spec = house.spec("a", lr="lr = 1e-2\nuntil = 1.0")
    assert house.fluxrun("queue", spec).code == 0
    assert held == [0, 0]  # to learn, and to read the exported rows back
    assert shelves
