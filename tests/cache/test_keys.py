"""Every part of every key of the cache: what goes into an entry names it, so that nothing stale is ever read."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from runner.base.architectures import FLUX1
from runner.base.files import BUILTIN, PARTS, fingerprint
from runner.cache import keys
from runner.cache.keys import Entry
from runner.checkpoint.storage import Weights
from runner.model import loading as part_loading
from runner.model import quantization
from runner.model.base import Base
from runner.model.flux1 import loading
from runner.spec.schema import Data, Spec
from runner.training import model_pool
from runner.training.context import RunContext
from tests.support.house import House
from tests.support.runs import context_of

TINY = BUILTIN["builtin:tiny"]
CPU = torch.device("cpu")


def distinct(named: dict[str, Any]) -> None:
    """No two of them are equal; which, if two are."""
    same = [(one, other) for one in named for other in named if one < other and named[one] == named[other]]
    assert not same, f"alike: {same}"


# ---- text embeddings -----------------------------------------------------------------------------------------------

PRINTS = {"text_encoder": "a", "tokenizer": "b", "text_encoder_2": "c", "tokenizer_2": "d"}
WRITTEN = Entry("a <s0>", "diffusers", 77)


def text_key(encoder: str = "clip", asked: Entry = WRITTEN, fingerprints: dict[str, str] = PRINTS, **more: Any) -> str:
    return keys.text_key(FLUX1.encoders[encoder], asked, fingerprints, **{"dtype": "torch.float32", **more})


@pytest.mark.parametrize("encoder", ["clip", "t5"])
def test_every_part_of_a_text_key(encoder: str) -> None:
    own = FLUX1.encoders[encoder].parts
    made = {
        "as it is": text_key(encoder),
        "another text": text_key(encoder, replace(WRITTEN, expanded="a <s1>")),
        "another length": text_key(encoder, replace(WRITTEN, length=32)),
        "another dtype": text_key(encoder, dtype="torch.bfloat16"),
        "learned": text_key(encoder, learned="rows"),
        "a LoRA's scale": text_key(encoder, scale=[8.0]),
        "another scale": text_key(encoder, scale=[4.0]),
        "quantised": text_key(encoder, quantization=["int8"]),
        **{f"another {part}": text_key(encoder, fingerprints={**PRINTS, part: "x"}) for part in own},
        "the other encoder": text_key("t5" if encoder == "clip" else "clip"),
    }
    pooled = text_key(encoder, replace(WRITTEN, pooling="eos"))
    if encoder == "clip":
        made["another pooling"] = pooled
    else:
        assert pooled == made["as it is"]  # T5 is not pooled
    distinct(made)
    others = {part: "x" for part in PRINTS if part not in own}
    assert text_key(encoder, fingerprints={**PRINTS, **others}) == made["as it is"]
    # Each parameter and each field is among those above; a new one fails this until it is.
    assert set(inspect.signature(keys.text_key).parameters) == {
        "encoder", "asked", "fingerprints", "dtype", "learned", "scale", "quantization",
    }  # fmt: skip
    assert {field.name for field in fields(Entry)} == {"expanded", "pooling", "length"}


def tuned(house: House, **more: str) -> RunContext:
    return context_of(house.spec("a", **more))


def test_a_run_puts_all_of_them_into_its_text_keys(house: House) -> None:
    """dtype and quantisation of the base, what was learned, CLIP's LoRA and its alpha, the token written out."""
    plain = tuned(house)
    rows = {"clip": torch.ones(2, 64), "t5": torch.ones(2, 96)}
    lora = {"x.lora_A.weight": torch.ones(2, 2)}
    caption = "a TOK on a hill"

    def key(context: RunContext, encoder: str, weights: Weights | None = None, pooling: str = "diffusers") -> str:
        return context.text_key(encoder, caption, pooling, weights or Weights())

    half = replace(plain, base=replace(plain.base, dtype=torch.bfloat16))
    held = replace(plain, base=replace(plain.base, quantize="int8"))
    other = replace(plain, fingerprints=dict.fromkeys(PARTS, "x"))
    adapted = [
        replace(plain, spec=plain.spec.model_copy(update={"text_lora": SimpleNamespace(alpha=alpha)}))
        for alpha in (2.0, 4.0)
    ]
    for encoder in ("clip", "t5"):
        made = {
            "as it is": key(plain, encoder),
            "dtype": key(half, encoder),
            "another base": key(other, encoder),
            "learned": key(plain, encoder, Weights(rows=rows)),
            "learned otherwise": key(plain, encoder, Weights(rows={name: 2 * value for name, value in rows.items()})),
            "length": key(replace(plain, spec=with_length(plain.spec, 16)), encoder) if encoder == "t5" else "",
            "without the token": replace(plain, plan=replace(plain.plan, placeholders=())).text_key(
                encoder, caption, "diffusers", Weights()
            ),
        }
        if encoder == "t5":
            made["quantised"] = key(held, encoder)
        else:
            made |= {f"LoRA, {one.spec.text_lora.alpha}": key(one, encoder, Weights(text_lora=lora)) for one in adapted}  # type: ignore[union-attr]
            made["other LoRA"] = key(
                adapted[0], encoder, Weights(text_lora={name: 2 * value for name, value in lora.items()})
            )
            made["pooling"] = key(plain, encoder, pooling="eos")
            assert key(held, encoder) == made["as it is"]  # CLIP is never quantised
        distinct(made)


def with_length(spec: Spec, length: int) -> Spec:
    return spec.model_copy(update={"model": spec.model.model_copy(update={"max_sequence_length": length})})


# ---- latents -------------------------------------------------------------------------------------------------------


def test_every_part_of_a_latents_key(house: House) -> None:
    """Pixels, their shape, the VAE, and the dtype that it encodes in: fp32 also where the base is fp16."""
    context = tuned(house)
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    changed = pixels.copy()
    changed[3, 5, 2] += 1

    def with_dtype(dtype: torch.dtype) -> RunContext:
        return replace(context, base=replace(context.base, dtype=dtype))

    distinct(
        {
            "as it is": context._latent_key(pixels),
            "one pixel": context._latent_key(changed),
            "turned": context._latent_key(pixels.reshape(6, 4, 3)),
            "another VAE": replace(context, fingerprints={"vae": "x"})._latent_key(pixels),
            "another dtype": with_dtype(torch.bfloat16)._latent_key(pixels),
        }
    )
    assert with_dtype(torch.float16)._latent_key(pixels) == context._latent_key(pixels)
    others = {part: "x" for part in PARTS if part != "vae"}
    assert replace(context, fingerprints=others)._latent_key(pixels) == context._latent_key(pixels)


# ---- the list of a data set's latents ------------------------------------------------------------------------------

# Every key under [data]: another value, or None where it does not change which latents there are.
VIEWS: dict[str, Any] = {
    "source": None,  # its fingerprint counts
    "config": "small",
    "split": "test",
    "image_column": "img",
    "caption_column": "text",
    "prompt": "a thing",
    "repeats": None,
    "resolution": 32,
    "buckets": True,
    "center_crop": False,
    "random_flip": True,
    "interpolation": "nearest",
    "variants": 3,
    "caption_dropout": None,
    "holdout": 2,
    "workers": None,
}


def test_every_part_of_the_key_of_a_data_sets_latents(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tuned(house).spec

    def key(data: str = "data", vae: str = "vae", dtype: str = "fp32", **changes: Any) -> str:
        other = spec.model_copy(update={"data": spec.data.model_copy(update=changes)})
        found = keys.views_key(other, data, vae, dtype)
        assert found is not None
        return found

    made = {"as it is": key(), "data": key(data="x"), "vae": key(vae="x"), "dtype": key(dtype="x")}
    made |= {name: key(**{name: value}) for name, value in VIEWS.items() if value is not None}
    monkeypatch.setattr(keys, "_pillow", lambda: "another Pillow")
    made["Pillow"] = key()
    monkeypatch.undo()
    distinct(made)
    same: dict[str, Any] = {"source": str(house.folder), "repeats": 3, "caption_dropout": 0.5, "workers": 4}
    assert set(same) == {name for name, value in VIEWS.items() if value is None}
    assert {key(**{name: value}) for name, value in same.items()} == {made["as it is"]}
    assert set(Data.model_fields) == set(VIEWS)


def test_the_seed_counts_where_it_crops_or_mirrors(house: House) -> None:
    spec = tuned(house).spec

    def keys_of(**changes: Any) -> set[str | None]:
        data = spec.data.model_copy(update=changes)
        return {keys.views_key(spec.model_copy(update={"data": data, "seed": seed}), "d", "v", "t") for seed in (0, 1)}

    assert len(keys_of(center_crop=True, random_flip=False)) == 1
    assert len(keys_of(center_crop=False, random_flip=False)) == 2
    assert len(keys_of(center_crop=True, random_flip=True)) == 2


def test_a_data_set_that_only_has_a_name_is_listed_anew(house: House) -> None:
    """A name on the hub may stand for other pictures tomorrow."""
    spec = tuned(house).spec
    hub = spec.model_copy(update={"data": spec.data.model_copy(update={"source": "someone/pictures"})})
    assert keys.views_key(hub, "d", "v", "t") is None


# ---- models --------------------------------------------------------------------------------------------------------


def test_every_part_of_a_quantised_models_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(TINY, None, CPU, torch.float32, "int8", tmp_path, False)
    monkeypatch.setattr(part_loading, "weight_files", lambda *_: {})
    monkeypatch.setattr(quantization, "load_quantized", lambda *told: told[-1])

    def kept(base: Base, part: str = "transformer") -> Any:
        return part_loading.load_streaming(
            loading.empty_transformer if part == "transformer" else loading.empty_t5, base, part
        )

    other = tmp_path / "other"
    shutil.copytree(TINY / "transformer", other / "transformer")
    config = other / "transformer" / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    made = {
        "as it is": kept(base),
        "T5": kept(base, "text_encoder_2"),
        "other files": kept(replace(base, folder=other)),
        "variant": kept(replace(base, variant="fp16")),
        "dtype": kept(replace(base, dtype=torch.bfloat16)),
        "nf4": kept(replace(base, quantize="nf4")),
    }
    monkeypatch.setattr(quantization, "FORMAT", quantization.FORMAT + 1)
    made["another format"] = kept(base)
    distinct(made)
    assert all(path.parent.parent == tmp_path / "quantized" for path in made.values())
    monkeypatch.undo()
    monkeypatch.setattr(part_loading, "weight_files", lambda *_: {})
    monkeypatch.setattr(quantization, "load_quantized", lambda *told: told[-1])
    assert kept(replace(base, offload=True)) == kept(base) == made["as it is"]
    assert kept(replace(base, quantize="none")) is None
    assert kept(replace(base, cache=None)) is None


# Every field of a base: another value, or None where it does not change the transformer that is loaded.
OTHER_BASE: dict[str, Any] = {
    "folder": "a copy elsewhere",
    "variant": "fp16",
    "device": torch.device("meta"),
    "dtype": torch.bfloat16,
    "quantize": "int8",
    "cache": None,
    "offload": True,
}


def test_a_kept_transformer_is_only_lent_as_the_one_it_is(tmp_path: Path) -> None:
    """From run to run: every field of its base, and its files, as they are now."""
    folder = tmp_path / "base"
    shutil.copytree(TINY, folder)
    base = Base(folder, None, CPU, torch.float32)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    others = {**OTHER_BASE, "folder": copy}
    made = {"as it is": model_pool._key(base)}
    made |= {
        name: model_pool._key(replace(base, **{name: value})) for name, value in others.items() if value is not None
    }
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    made["other files"] = model_pool._key(base)
    distinct(made)
    assert {field.name for field in fields(Base)} == set(OTHER_BASE)
    assert model_pool._key(replace(base, cache=tmp_path)) == made["other files"]


def test_a_fingerprint_follows_every_file_and_both_its_ends(tmp_path: Path) -> None:
    """Names, sizes, and 64 KiB at the start, in the middle and at the end."""
    part = tmp_path / "transformer"
    part.mkdir()
    (part / "config.json").write_text("{}")
    weights = bytearray(1 << 20)
    file = part / "model.safetensors"
    file.write_bytes(weights)
    made = {"as it is": fingerprint(part)}
    for name, at in {"start": 0, "middle": 1 << 19, "end": (1 << 20) - 1}.items():
        changed = bytearray(weights)
        changed[at] = 1
        file.write_bytes(changed)
        made[name] = fingerprint(part)
    file.write_bytes(weights[:-1])
    made["shorter"] = fingerprint(part)
    file.write_bytes(weights)
    assert fingerprint(part) == made["as it is"]
    (part / "note.md").write_text("not the model's")
    assert fingerprint(part) == made["as it is"]
    (part / "config.json").write_text("[]")
    made["config"] = fingerprint(part)
    (part / "config.json").rename(part / "other.json")
    made["another name"] = fingerprint(part)
    distinct(made)


def test_a_base_is_all_of_its_parts(house: House) -> None:
    context = tuned(house)
    made = {"as it is": context.base_fingerprint}
    made |= {part: replace(context, fingerprints={part: "x"}).base_fingerprint for part in PARTS}
    distinct(made)
