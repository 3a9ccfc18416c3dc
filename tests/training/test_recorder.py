"""The numbers a run records about its token rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from runner.spec.schema import Token


def test_norm_and_drift_are_a_tokens_own_and_a_mean_over_its_vectors() -> None:
    import torch

    from runner.data.tokens import placeholders
    from runner.training.live_encoder import LiveEncoder
    from runner.training.phases.train import row_sizes

    family: Any = None  # measuring rows needs none
    encoder = LiveEncoder(family, "clip", torch.nn.Identity(), None, 1.0)
    encoder.first_rows = torch.tensor([[4.0, 0.0], [0.0, 4.0], [2.0, 0.0]])
    encoder.rows = torch.nn.Parameter(torch.tensor([[4.0, 3.0], [0.0, 5.0], [2.0, 0.0]]))
    context: Any = SimpleNamespace(
        plan=SimpleNamespace(placeholders=placeholders([Token(name="CAT"), Token(name="DOG", vectors=1)]))
    )
    assert row_sizes(context, {"clip": encoder}) == {
        "rows/norm CAT clip": 5.0,
        "rows/drift CAT clip": 0.5,  # 3 and 1, of a length of 4
        "rows/norm DOG clip": 2.0,
        "rows/drift DOG clip": 0.0,
    }
    encoder.rows.requires_grad_(False)
    assert row_sizes(context, {"clip": encoder}) == {}
