"""Where a run ends early, or exports an earlier step: everything names the step that was reached, and the one
exported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

import runner
from runner.report.page import render
from runner.runs.claim import claim_run
from runner.tracking.history import read_history
from tests.support.house import House
from tests.support.paths import OLD_RUNS
from tests.support.tensorboard import loaded


def trained(house: House, more: str) -> Path:
    """A run of six steps with a look at every second one."""
    text = house.spec("base").read_text().replace("[validate]\n", "[validate]\nevery = 2\n") + more
    said = house.fluxrun("queue", house.write("a.toml", text))
    assert said.code == 0, said.err
    return house.folder / "runs" / "a"


def picture_steps(run: Path) -> set[int]:
    events = loaded(run)
    return {image.step for tag in events.Tags()["images"] for image in events.Images(tag)}


def check_exported(run: Path, step: int) -> None:
    """Metadata, card and samples are of this step."""
    for path in run.glob("export/*.safetensors"):
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        assert about.get("ss_steps", str(step)) == str(step)
    assert f"by fluxrun, {step} steps." in (run / "export" / "README.md").read_text()
    assert (run / "samples" / f"step-{step:06d}-0.png").read_bytes() == (run / "export/samples/0.png").read_bytes()
    assert json.loads((run / "state.json").read_text())["exported_step"] == step


def row_of(house: House, *words: str) -> list[str]:
    [row] = [line.split() for line in house.fluxrun(*words).out.splitlines() if line.split()[:1] == ["a"]]
    return row


def page_steps(runs: Path) -> list[str]:
    return re.findall(r'<td class="num" data-v="(\d+)">\d+', render(runs))


def test_an_early_stop(house: House) -> None:
    run = trained(house, "[stop]\nat = 1e9\n")
    assert picture_steps(run) == {2}
    assert {path.name for path in run.glob("samples/step-*")} == {"step-000000-0.png", "step-000002-0.png"}
    check_exported(run, 2)
    [record] = runner.results(run.parent)
    assert (record.step, record.steps, record.exported_step) == (2, 2, 2)
    index = json.loads((run.parent / "index.jsonl").read_text())
    assert (index["step"], index["steps"]) == (2, 2)
    results = house.fluxrun("results").out
    assert re.search(r" steps ", results)
    assert "a: eval loss" in results
    assert "at step 2 has come down to stop.at (1e+09)" in results
    assert row_of(house, "results")[4:5] == ["2"]
    assert row_of(house, "status")[3] == "2/6"
    assert page_steps(run.parent) == ["2"]
    assert [event.step for event in loaded(run).Scalars("run/train_loss")][-1] == 2


def test_export_best(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of the looks are given: the one at step 4 is the lowest."""
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr("runner.training.objective.FlowObjective.evaluate", lambda _: {0.5: next(losses)})
    run = trained(house, "[export]\nbest = true\n")
    best = 4
    assert picture_steps(run) == {2, 4}  # drawn while it trained, and from the exports; none at 6
    assert not list(run.glob("samples/step-000006-*"))
    check_exported(run, best)
    [record] = runner.results(run.parent)
    assert (record.step, record.steps, record.exported_step) == (6, 6, best)
    monkeypatch.setenv("COLUMNS", "200")
    assert "exported step" in house.fluxrun("results").out
    assert f"<dt>exported step</dt><dd>{best}</dd>" in render(run.parent)


def test_a_run_that_ended_early_has_no_steps_left(house: House) -> None:
    """Its export was interrupted: a plan does not count the steps that will not be trained."""
    from runner.jobs.prepare import prepare_jobs
    from runner.jobs.timing import steps_left

    runs = house.folder / "runs"
    [job] = prepare_jobs([house.spec("a")], runs, fetch=False, fresh=False)
    claim_run(job.run, job.spec, job.plan, "0", job.source.origin)
    job.run.write_state("stopped", step=2, ended="eval loss 0.1 at step 2 has come down to stop.at (1)")
    job.run.release()
    [job] = prepare_jobs([house.folder / "a.toml"], runs, fetch=False, fresh=False)
    assert (job.status.state, steps_left(job)) == ("resume", 0)
    job.run.update_state(ended=None)
    assert steps_left(job) == 6


# ---- learning rates ------------------------------------------------------------------------------------------------


def test_each_learning_rate_is_a_curve_of_its_own(done: House) -> None:
    """Pivotal: the rows' rate until the pivot, the LoRA's all along."""
    found = read_history(done.folder / "runs" / "a" / "history.jsonl")
    assert found["lr/lora"] == dict.fromkeys(range(1, 7), 1e-3)
    assert found["lr/rows"] == dict.fromkeys(range(1, 4), 1e-2)
    assert "train/lr" not in found
    events = loaded(done.folder / "runs" / "a")
    assert [event.step for event in events.Scalars("lr/rows")] == [1, 2, 3]


def test_the_rates_of_groups_and_prodigys_own() -> None:
    import torch
    from torch import nn

    from runner.training.optimizers import AdamWParams, Optimizer, ParameterGroup, ProdigyParams

    def groups(lr: float, text_lr: float) -> list[ParameterGroup]:
        weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
        names = ("lora/transformer/a", "rows/clip", "text_lora/b")
        return [
            ParameterGroup({name: weight}, rate, 0.0)
            for name, weight, rate in zip(names, weights, (lr, lr, text_lr), strict=True)
        ]

    plain = Optimizer(groups(1e-3, 5e-4), AdamWParams(0.9, 0.999, 1e-8))
    for weight in plain.parameters:
        weight.grad = torch.ones(2)
    plain.step(0.5)
    assert plain.learning_rates() == {"lora": 5e-4, "rows": 5e-4, "text_lora": 2.5e-4}
    numbers = ProdigyParams(0.9, 0.999, None, 1e-8, True, True, True, 1.0, 1e-6, None)
    prodigy = Optimizer(groups(1.0, 1.0), numbers)
    for weight in prodigy.parameters:
        weight.grad = torch.ones(2)
    prodigy.step(1.0)
    d = prodigy.state()[1]["shared"]["d"]
    assert prodigy.learning_rates() == {"lora": d, "rows": d, "text_lora": d}
    assert 0 < d < 1


def test_an_old_runs_history_is_still_read() -> None:
    night = OLD_RUNS / "v1" / "night"
    assert runner.history(night, "whole")["train/lr"][1] == 0.01
    assert "whole" in render(night)
