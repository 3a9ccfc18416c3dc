"""Prompt embeddings and learned token rows, against stock diffusers and the reference script."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runner.model import token_rows
from runner.model.flux1 import loading, text_encoders
from tests.support.bases import BASE

# ---- files ---------------------------------------------------------------------------------------------------------


# ---- tokens and text -----------------------------------------------------------------------------------------------


def encoders() -> list[tuple[str, PreTrainedModel, PreTrainedTokenizerBase]]:
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
            token_rows.attach_token_rows(model, tokenizer, ["<s0>", "<s1>"], nn.Parameter(rows))
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
        token_rows.attach_token_rows(model, tokenizer, ["<s0>", "<s1>"], rows)
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
        random_rows = token_rows.initial_rows(model, tokenizer, [(64, None)], 0, name)
        assert math.isclose(float(random_rows.std()), token_rows.table_std(model), rel_tol=0.1)
        assert torch.equal(random_rows, token_rows.initial_rows(model, tokenizer, [(64, None)], 0, name))
        assert not torch.equal(random_rows, token_rows.initial_rows(model, tokenizer, [(64, None)], 1, name))
        from_phrase = token_rows.initial_rows(model, tokenizer, [(3, "red heart")], 0, name)
        ids = tokenizer("red heart", add_special_tokens=False).input_ids
        assert len(ids) == 2
        assert torch.equal(from_phrase[:2], model.get_input_embeddings().weight[ids].detach())
        assert torch.equal(from_phrase[2:], token_rows.initial_rows(model, tokenizer, [(3, None)], 0, name)[2:])


def test_the_rescale_is_the_references() -> None:
    rows = torch.randn(4, 8) * 3
    wanted = rows * (0.5 / rows.std()) ** 0.1
    token_rows.keep_std(rows, 0.5)
    assert torch.allclose(rows, wanted)


# ---- the objective -------------------------------------------------------------------------------------------------


# ---- adapters ------------------------------------------------------------------------------------------------------


# ---- optimizers and schedules --------------------------------------------------------------------------------------
