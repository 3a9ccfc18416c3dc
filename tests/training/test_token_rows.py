"""What is done to learned token rows after each step, by the objective of a real run."""

from __future__ import annotations

import pytest
import torch

from runner.checkpoint.storage import Weights
from runner.training.live_encoder import LiveEncoder
from tests.support.house import House
from tests.support.objectives import objective_of, spec_of
from tests.support.runs import context_of


def test_after_a_step_the_rows_are_pulled_back_to_the_tables_size(house: House) -> None:
    """A tenth of the way, in logarithm, in both encoders; rows that are only read stay as they are."""
    context = context_of(spec_of(house))
    objective, _ = objective_of(context)
    before = {}
    for name in ("clip", "t5"):
        live = objective.encoders[name]
        assert isinstance(live, LiveEncoder)
        assert live.rows is not None
        with torch.no_grad():
            live.rows.mul_(5)  # as if a step had
        before[name] = live.rows.detach().clone()
    objective.post_step()
    for name, rows in before.items():
        live = objective.encoders[name]
        assert isinstance(live, LiveEncoder)
        assert live.rows is not None
        table = live.model.get_input_embeddings().weight.float().std()  # type: ignore[operator]
        wanted = rows * (table / rows.std()) ** 0.1
        assert float((wanted - rows).abs().max()) > 0.1 * float(rows.abs().max())
        assert torch.allclose(live.rows, wanted, rtol=1e-6, atol=0)
    fixed = LiveEncoder.load(context, "clip", Weights(rows={"clip": before["clip"]}))
    assert fixed.rows is not None
    fixed.post_step()
    assert torch.equal(fixed.rows, before["clip"])


def test_a_step_settles_the_rows_once(house: House) -> None:
    """In the loop: not for each micro-batch, and not after a step that was skipped."""
    from tests.support.step_loop import Line, run

    line = Line(bad=(2,))
    run(line, 6)
    assert line.post_steps == 5


@pytest.mark.parametrize("encoder", ["clip", "t5"])
def test_the_first_rows_are_told_from_what_they_became(house: House, encoder: str) -> None:
    """Drift is measured from where the rows began, also where they go on from a checkpoint."""
    context = context_of(spec_of(house))
    width = {"clip": 64, "t5": 96}[encoder]
    fresh = LiveEncoder.load(context, encoder, Weights(), learn_rows=True)
    later = LiveEncoder.load(context, encoder, Weights(rows={encoder: torch.ones(2, width)}), learn_rows=True)
    assert fresh.rows is not None
    assert fresh.first_rows is not None
    assert later.rows is not None
    assert later.first_rows is not None
    assert torch.equal(fresh.rows, fresh.first_rows)
    assert torch.equal(later.first_rows, fresh.first_rows)
    assert torch.equal(later.rows, torch.ones(2, width))
