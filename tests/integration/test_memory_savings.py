"""A run that saves memory is the same run."""

from __future__ import annotations

import shutil

import pytest

from tests.support.house import House
from tests.support.objectives import with_model
from tests.support.runs import export_bytes, stopping_after


@pytest.mark.parametrize(
    ("first", "more"),
    [
        ('quantize = "int8"', 'offload = "blocks"'),
        ("", "gradient_checkpointing = 2"),
        ("", 'gradient_checkpointing = "selective"'),
        ('quantize = "int8"\ndtype = "bf16"', 'gradient_checkpointing = "selective"'),
    ],
    ids=["offload", "checkpointing", "selective", "selective, of codes in bf16"],
)
def test_a_run_that_saves_memory_is_the_same_run(house: House, first: str, more: str) -> None:
    """As typed: begun without, gone on with it, since that is not in the key; to the same bytes."""
    spec = with_model(house, first)
    assert house.fluxrun("queue", spec).code == 0
    runs = house.folder / "runs"
    whole = export_bytes(runs / "a")
    shutil.rmtree(runs / "a")
    with stopping_after(2):
        assert house.fluxrun("queue", spec).code == 3
    with_model(house, f"{first}\n{more}")
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    found = export_bytes(runs / "a")
    card = "export/README.md"  # names the settings
    assert {name: data for name, data in found.items() if name != card} == {
        name: data for name, data in whole.items() if name != card
    }
    assert house.fluxrun("sample", "a", "--prompt", "a TOK", "--steps", "1").code == 0
