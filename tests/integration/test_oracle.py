"""Real runs, held step by step against a second trainer that shares no code with the first (tests/support/oracle.py).

`tests/support/oracle_compare.py` has the specs, the comparison and the tolerances; `just oracle` prints what is
measured.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from runner.checkpoint.storage import Weights
from runner.runs.run import Run
from runner.training.objective import FlowObjective
from runner.training.phases.train import load_encoders, load_transformer
from tests.support import oracle, oracle_compare
from tests.support.house import House
from tests.support.oracle_compare import BOTH, FP32, SPECS, TINY, both, differences, near_of, too_far, write_spec
from tests.support.paths import PROJECT
from tests.support.runs import context_of

# What is special about these is held elsewhere, too, by a formula or a shorter test: `just slow` runs them.
BESIDE = {
    "restarts", "polynomial", "constant with warm-up", "logit_normal", "mode", "sigma_sqrt", "cosmap, low guidance", "8-bit adam",
    "two processes",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in BESIDE)) for name in SPECS])
def test_a_run_does_what_the_oracle_does(house: House, name: str) -> None:
    far = too_far(differences(*both(house, SPECS[name])), near_of(name))
    assert not far, "\n".join(far)


def test_a_halved_micro_batch_is_the_same_batch(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """After memory fell short: the sums are taken in another order, and that is all."""
    spec = write_spec(
        house, {**BOTH, "train.batch_size": 4, "prior.images": "class", "prior.prompt": "a disc", "prior.count": 3}
    )
    other = oracle.Oracle(spec, TINY)
    start = other.tensors()
    monkeypatch.setattr(Run, "micro_batch_parts", lambda self, batch_size: 2)
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    far = too_far(differences(house.folder / "runs" / "a", other.train(), start), FP32)
    assert not far, "\n".join(far)


def test_the_table_tells_what_is_too_far(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(PROJECT / "tools"))
    monkeypatch.setattr(sys, "argv", ["oracle_table.py", "lora"])
    monkeypatch.setattr(oracle_compare, "FP32", replace(FP32, weights=0.0))
    import oracle_table

    assert oracle_table.main() == 1
    said = capsys.readouterr()
    heading, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in said.out.splitlines())
    assert heading == ["spec", "steps compared", "loss", "learning rate", "gradient norm", "weights"]
    assert row[:2] == ["lora", "6 of 6"]
    apart, allowed = zip(*(map(float, cell.split(" / ")) for cell in row[2:]), strict=True)
    assert allowed == (FP32.loss, FP32.lr, FP32.norm, 0.0)
    assert [one <= most for one, most in zip(apart, allowed, strict=True)] == [True, True, True, False]
    told = [line for line in said.err.splitlines() if " apart, " in line]
    assert len(told) == 1
    assert told[0].startswith("lora: weights of lora: ")


def test_a_look_changes_nothing_of_what_follows(house: House) -> None:
    """Dropout goes on after the eval loss was taken: the same loss, to the bit, before and after."""
    context = context_of(write_spec(house, {"lora.dropout": 0.5}))
    [phase] = context.plan.training
    transformer, adapter = load_transformer(context, phase, Weights())
    with torch.no_grad():
        for parameter in adapter.values():  # B is zero at first, and hides what dropout does
            parameter.add_(0.1)
    objective = FlowObjective(context, transformer, load_encoders(context, phase, Weights()))
    before = objective.loss(0, 0)
    first = objective.evaluate()
    assert torch.equal(objective.loss(0, 0), before)
    torch.rand(1)  # else dropout would be drawn as in the first look
    assert objective.evaluate() == first  # without dropout
    objective.close()
