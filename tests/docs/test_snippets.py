"""The Python that a card and the pages show, run whole as it stands, on what it stands beside."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import runner
from runner.base.files import BUILTIN
from runner.checkpoint.storage import Weights
from runner.export import verify
from runner.export.about import ExportInfo
from runner.export.formats import LORA_FILE
from runner.export.model_card import model_card
from runner.model.flux1.pipeline import Flux1TextPipeline
from tests.support.adapters import ABOUT
from tests.support.cards import card_of
from tests.support.house import House
from tests.support.markdown import Block, blocks
from tests.support.paths import PROJECT
from tests.support.snippets import difference, run


def test_a_cards_code_draws_the_cards_first_picture(
    done: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(done.folder / "runs" / "a" / "export", tmp_path / "pasted")
    _, code = card_of(done.folder / "runs" / "a")
    names = run(code, folder, monkeypatch)
    assert difference(folder / "image.png", folder / "samples" / "0.png") <= 1
    rows = load_file("a_emb.safetensors")
    stored = Weights(rows={"clip": rows["clip_l"], "t5": rows["t5xxl"]})
    verify.loaded_embeddings(Flux1TextPipeline(names["pipe"]).encoders, stored, ["<s0>", "<s1>"])


@pytest.fixture
def after_the_quickstart(done: House, tmp_path: Path) -> Path:
    """The finished run in the quickstart's place."""
    shutil.copytree(done.folder / "runs" / "a", tmp_path / "runs" / "quickstart")
    export = tmp_path / "runs" / "quickstart" / "export"
    for path in export.glob("a*.safetensors"):
        path.rename(path.with_name(f"quickstart{path.name.removeprefix('a')}"))
    return tmp_path


DRAWING = blocks(PROJECT / "docs" / "exports.md", "python")


@pytest.fixture(scope="module")
def wanted(done: House) -> Path:
    """What the pages' code shall draw."""
    prompt = "a TOK on a mint background on the left"
    said = done.fluxrun("sample", "a", "--prompt", prompt, "--seed", "0", "--steps", "20", "--out", "wanted")
    assert said.code == 0, said.err
    return done.folder / said.out.strip()


@pytest.mark.parametrize("block", DRAWING, ids=str)
def test_a_pages_code_draws_what_was_learned(
    block: Block, wanted: Path, after_the_quickstart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(block.text, after_the_quickstart, monkeypatch)
    assert difference(after_the_quickstart / "creature.png", wanted) <= 1


def test_the_page_of_exports_shows_how_to_draw() -> None:
    assert DRAWING


def test_the_notebooks_code_works(done: House, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    [block] = blocks(PROJECT / "docs" / "reading-results.md", "python")
    names = run(block.text, done.folder, monkeypatch)
    assert names["records"][0].name == "a"
    assert len(names["frame"]) == 1
    assert list(names["curve"]) == [6]


def test_the_bundled_bases_folder() -> None:
    assert runner.base_folder("builtin:tiny") == BUILTIN["builtin:tiny"]
    with pytest.raises(ValueError, match="'x' is no bundled base; bundled are: builtin:tiny"):
        runner.base_folder("x")


OF_DEV = {
    **ABOUT.settings, "validate.prompts": (), "validate.steps": 28, "validate.size": 768, "model.max_sequence_length": 256,
}  # fmt: skip


def shown(about: ExportInfo) -> list[str]:
    card = model_card(about, {LORA_FILE: 0.0}, (), 3.5, None, (), False)
    return card.split("```python\n")[1].split("```")[0].splitlines()


def test_a_cards_code_is_its_runs_own() -> None:
    """Base, size, length, steps, dtype and guidance, where nothing here can run it."""
    dev = dataclasses.replace(ABOUT, base="black-forest-labs/FLUX.1-dev", settings=OF_DEV)
    code = shown(dev)
    assert code[:2] == ["import torch", "from diffusers import AutoPipelineForText2Image"]
    assert 'base = "black-forest-labs/FLUX.1-dev"' in code
    assert 'dtype = torch.bfloat16 if device == "cuda" else torch.float32' in code
    assert code[-5:] == [
        f'pipe.load_lora_weights(folder, weight_name="{LORA_FILE}")',
        'image = pipe("a thing", num_inference_steps=28, guidance_scale=3.5,',
        "    max_sequence_length=256, height=768, width=768,",
        '    generator=torch.Generator().manual_seed(0), joint_attention_kwargs={"scale": 1.0}).images[0]',
        'image.save("image.png")',
    ]
    other = {
        **OF_DEV,
        "model.dtype": "fp16",
        "model.revision": "v2",
        "model.variant": "fp16",
        "validate.prompts": ("one", "two"),
    }
    code = shown(dataclasses.replace(dev, base="my-tune", settings=other, guided=False))
    assert 'base = "my-tune"  # the name of a folder: write where it lies on your disk' in code
    assert "dtype = torch.float16" in code
    assert 'from_pretrained(base, torch_dtype=dtype, revision="v2", variant="fp16")' in "\n".join(code)
    assert 'image = pipe("one", num_inference_steps=28,' in code
