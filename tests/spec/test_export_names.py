"""What exported files and learned words are called: every program must take the names, and two runs' must differ."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner.base.files import BUILTIN
from runner.core import safetensors
from runner.core.errors import FluxrunError
from runner.data import tokens
from runner.model import token_rows
from runner.spec.export_names import file_stem
from runner.spec.schema import Token
from tests.support.cards import card_of
from tests.support.house import House
from tests.support.runs import context_of
from tests.support.snippets import difference, run

TAKEN_BY_ALL = re.compile(r"[A-Za-z0-9_-]+")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("quickstart", "quickstart"),
        ("flux-dev_3d", "flux-dev_3d"),
        ("cats/tabby", "cats-tabby"),
        ("one/lora.rank=4", "one-lora-rank-4"),
        ("one/lora.rank=4,train.lr=0.0001", "one-lora-rank-4-train-lr-0_0001"),
        ("one/train.lr=1e-05,train.weighting.scheme=mode", "one-train-lr-1e-05-train-weighting-scheme-mode"),
    ],
)
def test_file_stems_of_run_names(name: str, stem: str) -> None:
    assert file_stem(name) == stem


def test_every_run_of_a_sweep_has_different_file_names() -> None:
    values = [
        "1",
        "15",
        "1.5",
        "1e-5",
        "1e-05",
        "1e+5",
        "1_5",
        "1-5",
        "a",
        "a-b",
        "a_b",
        "a.b",
        "a+b",
        "true",
        "64-32",
        "-",
    ]
    names = [f"one/train.lr={a},data.prompt={b}" for a, b in itertools.product(values, values)]
    names += [f"one/data.prompt={value}" for value in (*values, "a-data-prompt-b")]
    names += ["v1.5", "v1_5", "v1-5", "v1+5", "v1=5", "v1,5"]
    stems = [file_stem(name) for name in names]
    assert all(TAKEN_BY_ALL.fullmatch(stem) for stem in stems)
    assert not any(stem.startswith("-") for stem in stems)
    assert len({stem.lower() for stem in stems}) == len(names)
    assert re.fullmatch(r"v1_5-[0-9a-f]{6}", file_stem("v1.5"))
    assert file_stem("v1_5") == "v1_5"


def test_a_sweeps_run_with_a_word_of_its_own(house: House, done: House, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = house.spec(name='name = "TOK"\nplaceholder = "bird"', steps="steps = 2")
    spec.write_text(spec.read_text() + '[sweep]\n"train.lr" = [0.0005]\n')
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    folder = house.folder / "runs" / "a" / "train.lr=0.0005"
    stem = "a-train-lr-0_0005"
    weights = {f"{stem}.safetensors", f"{stem}_emb.safetensors", f"{stem}_emb_webui.safetensors"}
    assert {path.name for path in (folder / "export").glob("*.safetensors")} == {
        *weights,
        "pytorch_lora_weights.safetensors",
    }
    header = safetensors.read_metadata(folder / "export" / f"{stem}.safetensors")
    assert (header["ss_output_name"], header["modelspec.title"]) == (stem, "a/train.lr=0.0005")
    assert header["modelspec.usage_hint"] == (
        f"diffusers: TOK is <bird0><bird1>; ComfyUI: embedding:{stem}_emb; WebUI: {stem}_emb_webui"
    )
    card, code = card_of(folder)
    assert f"`a {stem}_emb_webui on a hill <lora:{stem}:1>`" in card
    assert f"Put `{stem}_emb.safetensors` into `models/embeddings` and write `embedding:{stem}_emb`" in card
    assert "`<bird0><bird1>` is what the training captions call TOK" in card
    assert "<s0>" not in card
    pasted = shutil.copytree(folder / "export", house.folder / "pasted")
    names = run(code, pasted, monkeypatch)
    assert difference(pasted / "image.png", pasted / "samples" / "0.png") <= 1

    # beside another run's, whose word is <s0><s1>
    pipe, other = names["pipe"], done.folder / "runs" / "a" / "export"
    pipe.load_lora_weights(str(other), weight_name="pytorch_lora_weights.safetensors", adapter_name="other")
    [first] = set(pipe.transformer.peft_config) - {"other"}
    rows = load_file(other / "a_emb.safetensors")
    for key, suffix in (("clip_l", ""), ("t5", "_2")):
        encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}"), getattr(pipe, f"tokenizer{suffix}")
        pipe.load_textual_inversion(rows[key], token=["<s0>", "<s1>"], text_encoder=encoder, tokenizer=tokenizer)
        ids = tokenizer("a <bird0><bird1> beside a <s0><s1>").input_ids
        new = [tokenizer.convert_ids_to_tokens(one) for one in ids if one >= len(tokenizer) - 4]
        assert new == ["<bird0>", "<bird1>", "<s0>", "<s1>"]
    pipe.set_adapters([first, "other"], [0.8, 0.8])
    assert set(pipe.get_active_adapters()) == {first, "other"}

    # as an older fluxrun named the files: the run is done, and its embeddings are found
    old = "a-train.lr=0.0005"
    for path in list((folder / "export").glob(f"{stem}*")):
        path.rename(path.with_name(path.name.replace(stem, old)))
    state = (folder / "state.json").read_text()
    (folder / "state.json").write_text(state.replace(f"export/{stem}", f"export/{old}"))
    assert old in (folder / "state.json").read_text()
    assert "skipped, done" in house.fluxrun("queue", spec).err
    said = house.fluxrun("sample", "a/train.lr=0.0005", "--out", "drawn")
    assert difference(house.folder / said.out.strip(), pasted / "samples" / "0.png") == 0


# ---- placeholders ------------------------------------------------------------------------------------------------------


def pieces(*given: tuple[int, str | None]) -> list[str]:
    made = [Token(name=f"T{n}", vectors=vectors, placeholder=word) for n, (vectors, word) in enumerate(given)]
    return [one.text for one in tokens.placeholders(made)]


def test_placeholders_are_numbered_by_their_word() -> None:
    assert pieces((2, None), (1, None)) == ["<s0><s1>", "<s2>"]
    assert pieces((2, "bird"), (1, None), (2, None)) == ["<bird0><bird1>", "<s0>", "<s1><s2>"]


def planned(house: House, spec: Path) -> dict[str, str]:
    said = house.fluxrun("plan", spec, "--json")
    assert said.code == 0, said.out
    found: dict[str, str] = json.loads(said.out)["runs"][0]
    return found


def test_a_placeholder_is_in_the_key_only_where_it_is_set(house: House) -> None:
    plain = context_of(house.spec("a")).plan
    own = context_of(house.spec("a", name='name = "TOK"\nplaceholder = "bird"')).plan
    assert own.training_key != plain.training_key
    assert [one.text for one in own.placeholders] == ["<bird0><bird1>"]
    assert [one.text for one in plain.placeholders] == ["<s0><s1>"]
    assert "placeholder" not in planned(house, house.spec("a"))


def test_invalid_placeholders_are_refused(house: House) -> None:
    two = 'name = "TOK"\nplaceholder = "bird"\n[[tokens]]\nname = "DOG"\nplaceholder = "bird"'
    said = house.fluxrun("plan", house.spec(name=two))
    assert said.code == 2
    assert (
        "a.toml:13: tokens.1.placeholder: expected a different placeholder for each token, got 'bird' twice; change one, or "
        "remove both\n"
    ) in said.err
    for word in ("Bird", "bird1", "<bird>", "a b", ""):
        said = house.fluxrun("plan", house.spec(name=f'name = "TOK"\nplaceholder = "{word}"'))
        assert said.code == 2
        assert "a.toml:10: tokens.0.placeholder: " in said.err
        assert "of a-z, 0-9 and -, with a letter first and last" in said.err


def test_a_placeholder_in_the_bases_vocabulary_is_refused(house: House) -> None:
    base = house.folder / "base"
    shutil.copytree(BUILTIN["builtin:tiny"], base)
    known = base / "tokenizer" / "tokenizer.json"
    tables = json.loads(known.read_text())
    highest = max(one["id"] for one in tables["added_tokens"])
    tables["added_tokens"].append(
        {**tables["added_tokens"][-1], "id": highest + 1, "content": "<s1>", "special": False}
    )
    known.write_text(json.dumps(tables))
    spec = house.spec(base='base = "base"')
    said = house.fluxrun("check", spec)
    assert said.code == 2
    assert (
        "tokens.0.placeholder: CLIP's tokenizer of this base has <s1> already, so no new row can be learned for it; set another "
        'one, e.g. placeholder = "bird"'
    ) in said.out + said.err
    said = house.fluxrun("check", house.spec(base='base = "base"', name='name = "TOK"\nplaceholder = "bird"'))
    assert "has <" not in said.out + said.err

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, subfolder="tokenizer")
    with pytest.raises(FluxrunError, match=r"has <s1> already, .* give the token another tokens.placeholder"):
        token_rows.attach_token_rows(None, tokenizer, ["<s0>", "<s1>"], torch.nn.Parameter(torch.zeros(2, 8)))
