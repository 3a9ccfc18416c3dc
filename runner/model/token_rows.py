"""Learned token rows inside a frozen text encoder: a few new vocabulary entries behind its embedding table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.errors import FluxrunError
from runner.core.seeds import derive


class TokenRows(nn.Module):
    """A frozen embedding table followed by a few learned rows.

    Ids from `first` on are new tokens; `first` is the tokenizer's length, which may be below the table's (T5-XXL's
    table has 28 unused rows). Only `rows` [count, width] gets a gradient, never the table: two rows of T5-XXL are 8,192
    numbers, its table 131 million.
    """

    def __init__(self, table: nn.Embedding, first: int, rows: nn.Parameter) -> None:
        super().__init__()
        self.table = table
        self.first = first
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """The frozen table."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        frozen: Tensor = self.table(ids.clamp(max=self.first - 1))  # [B, T, width]
        learned = nn.functional.embedding((ids - self.first).clamp(min=0), self.rows).to(frozen.dtype)
        return torch.where((ids >= self.first)[..., None], learned, frozen)


def attach_token_rows(encoder: Any, tokenizer: Any, token_strings: Sequence[str], rows: nn.Parameter) -> None:
    """Give a loaded encoder and its tokenizer the new vocabulary, as load_textual_inversion will at inference.

    rows: [number of token strings, width]. Raises FluxrunError where the tokenizer has an entry of such a name.
    """
    vocabulary = tokenizer.get_vocab()
    if taken := [token_string for token_string in token_strings if token_string in vocabulary]:
        raise FluxrunError(
            f"the base's {type(tokenizer).__name__} has {taken[0]} already, so no new row can be learned for it; give the "
            "token another tokens.placeholder"
        )
    first = len(tokenizer)
    tokenizer.add_tokens(list(token_strings))
    encoder.set_input_embeddings(TokenRows(encoder.get_input_embeddings(), first, rows))


def table_std(encoder: Any) -> float:
    """Standard deviation over all numbers of the embedding table; new rows start at it and are kept at it."""
    return float(encoder.get_input_embeddings().weight.float().std())


def initial_rows(
    encoder: Any, tokenizer: Any, counts: Sequence[tuple[int, str | None]], seed: int, name: str
) -> Tensor:
    """The rows before training, [sum of vectors, width] fp32. counts: (vectors, initializer phrase or None) of each
    token; name: the encoder's, which the random rows depend on.

    Random rows have the table's standard deviation. The embeddings of a phrase's vocabulary entries become the first
    rows; if it has fewer entries than vectors, the others are random.
    """
    weight = encoder.get_input_embeddings().weight
    std = table_std(encoder)
    parts: list[Tensor] = []
    for index, (vectors, phrase) in enumerate(counts):
        generator = torch.Generator().manual_seed(derive(seed, "rows", name, index))
        rows = torch.randn(vectors, weight.shape[1], generator=generator) * std
        if phrase is not None:
            ids = tokenizer(phrase, add_special_tokens=False).input_ids[:vectors]
            rows[: len(ids)] = weight[torch.tensor(ids, device=weight.device)].float().cpu()
        parts.append(rows)
    return torch.cat(parts)


def keep_std(rows: Tensor, std: float) -> None:
    """Pull the rows' standard deviation a tenth of the way (in logarithm) back to the table's, in place.

    The reference script's `retract_embeddings`; called once per optimizer step, only while the rows learn.
    """
    with torch.no_grad():
        rows *= (std / rows.std()) ** 0.1
