"""Every key of a spec changes what a run is known by, or is named here as one that does not; in both cases a run folder
says so."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from runner.plan.build import make_plan
from runner.plan.phases import Plan
from runner.runs.checkpoint_files import checkpoint_name
from runner.runs.claim import claim_run
from runner.runs.run import Run
from runner.runs.status import RunStatus, status_of
from runner.spec.keys import spec_keys
from runner.spec.loader import load
from runner.spec.schema import Spec, dump
from tests.support.house import House
from tests.support.spec_examples import EXAMPLES, FACTS, LEAST, laid_over

# What is shown and exported, of the same training.
SHOWN = {"name", "export.dtype", "export.best",
         *(f"validate.{key}" for key in ("prompts", "every", "loss", "count", "steps", "size"))}  # fmt: skip
# What leaves the run as it is: how it is kept, told and computed; and paths, since what they point at counts (see
# below).
NOTHING = {
    "checkpoint.every", "checkpoint.minutes", "checkpoint.keep", "track.to", "hub.push", "hub.repo", "hub.private",
    "notify.url", "notify.command", "data.workers", "data.source", "model.base", "model.offload", "prior.images",
    "prior.batch_size", "model.gradient_checkpointing", "inversion.gradient_checkpointing",
}  # fmt: skip
# A run may be made longer or shorter where its schedule does not ask how long it is.
SPANS = {"train.steps", "train.epochs", "inversion.until", "lora.until", "text_lora.until"}


def spec_of(folder: Path, tables: dict[str, Any]) -> Spec:
    path = folder / "a.toml"
    path.write_text(tomli_w.dumps(tables))
    return load([path])[0].spec


def both(folder: Path, key: str) -> tuple[Spec, Spec]:
    """Without the key's example value, and with it."""
    value, more = EXAMPLES[key]
    tables = laid_over(LEAST, more)
    changed = copy.deepcopy(tables)
    *names, last = key.split(".")
    table: Any = changed
    for name in names:
        table = table.setdefault(name, {})
        table = table[0] if isinstance(table, list) else table
    table[last] = value
    return spec_of(folder, tables), spec_of(folder, changed)


def as_trained(folder: Path, spec: Spec, plan: Plan) -> Run:
    """The run folder of this spec, done, with a checkpoint of its first step."""
    run = Run(folder / "runs", "a")
    run.folder.mkdir(parents=True)
    run.spec_file.write_text(tomli_w.dumps(dump(spec)))
    run.plan_file.write_text(json.dumps({"key": plan.key, "training_key": plan.training_key}))
    run.state_file.write_text(json.dumps({"state": "done", "plan_key": plan.key, "exports": []}))
    header = json.dumps({"__metadata__": {"phase_key": plan.training[0].key}}).encode()
    run.checkpoints.mkdir()
    (run.checkpoints / checkpoint_name(1)).write_bytes(len(header).to_bytes(8, "little") + header)
    return run


@pytest.mark.parametrize("key", EXAMPLES)
def test_a_key_changes_what_it_should_and_the_run_folder_says_so(tmp_path: Path, key: str) -> None:
    spec, changed = both(tmp_path, key)
    assert spec != changed
    before, after = make_plan(spec, FACTS), make_plan(changed, FACTS)
    verdict = status_of(as_trained(tmp_path, spec, before), changed, after)
    same_training = key in SHOWN | NOTHING
    assert (before.training_key == after.training_key) == same_training
    assert (before.key == after.key) == (key in NOTHING)
    if key in NOTHING:
        assert verdict.state == "done"
    elif key in SHOWN:
        assert verdict == RunStatus("resume", "what is exported or shown changed; the training is kept")
    elif key in SPANS:
        assert verdict.state == "resume"
        assert verdict.reason.startswith(f"{key}: ")
        assert verdict.reason.endswith(f"; goes on from step 1 of {after.steps}")
    else:
        assert verdict.state == "changed"
        assert f"{'tokens' if key.startswith('tokens.') else key}: " in verdict.reason
        assert all(re.fullmatch(r"[a-z_.0-9]+: .+ -> .+", part) for part in verdict.reason.split("; ")), verdict.reason


def test_every_key_has_an_example() -> None:
    """A new key fails this until it stands in the table: then the test above asks what it changes."""
    tables = {name for name, about in spec_keys().items() if about.is_table}
    assert set(spec_keys()) - tables == set(EXAMPLES)
    assert set(EXAMPLES) >= SHOWN | NOTHING | SPANS


@pytest.mark.parametrize("key", ["model.gradient_checkpointing", "inversion.gradient_checkpointing"])
def test_what_is_recomputed_counts_where_code_is_compiled(tmp_path: Path, key: str) -> None:
    """Which then rounds otherwise."""
    keys = []
    for spec in both(tmp_path, key):
        compiled = spec.model_copy(update={"model": spec.model.model_copy(update={"compile": True})})
        keys.append(make_plan(compiled, FACTS).training_key)
    assert keys[0] != keys[1]


def test_when_training_looks_counts_where_a_look_may_end_it(tmp_path: Path) -> None:
    tables = laid_over(LEAST, {"validate": {"every": 4}, "stop": {"at": 0.1}})
    specs = [spec_of(tmp_path, laid_over(tables, {"validate": {"every": every}})) for every in (4, 2)]
    assert make_plan(specs[0], FACTS).training_key != make_plan(specs[1], FACTS).training_key


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_another_length_is_another_run_where_the_schedule_asks_for_it(tmp_path: Path, schedule: str) -> None:
    tables = laid_over(LEAST, {"schedule": {"name": schedule}})
    spec, longer = spec_of(tmp_path, tables), spec_of(tmp_path, laid_over(tables, {"train": {"steps": 9}}))
    run = as_trained(tmp_path, spec, make_plan(spec, FACTS))
    verdict = status_of(run, longer, make_plan(longer, FACTS))
    assert verdict == RunStatus("changed", f"train.steps: 8 -> 9; the {schedule} schedule depends on where it ends")


def test_what_the_paths_point_at_counts(tmp_path: Path) -> None:
    """By the fingerprints of data and base."""
    spec = spec_of(tmp_path, LEAST)
    keys = {
        make_plan(spec, facts).training_key
        for facts in (FACTS, replace(FACTS, data_fingerprint="x"), replace(FACTS, base_fingerprint="x"))
    }
    assert len(keys) == 3


def test_a_changed_value_is_refused_before_anything_starts(house: House) -> None:
    """As a session: interrupted, changed, refused with the key, both values and the ways out; changed back, it would go
    on."""
    spec = house.spec("a")
    text = spec.read_text()
    plan = json.loads(house.fluxrun("plan", spec, "--json").out)["runs"][0]
    assert plan["state"] == "new"
    from runner.jobs.prepare import prepare_jobs

    [job] = prepare_jobs([spec], house.folder / "runs", fetch=False, fresh=False)
    claim_run(job.run, job.spec, job.plan, "0")
    job.run.release()
    spec.write_text(text.replace("center_crop = true", "center_crop = true\ncaption_dropout = 0.1"))
    said = house.fluxrun("queue", spec)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(
        f"{spec}:1: name: runs/a holds another run: data.caption_dropout: 0.0 -> 0.1; give this spec another "
    )
    assert said.err.endswith("1 fault; nothing was started\n")
    spec.write_text(text)
    assert json.loads(house.fluxrun("plan", spec, "--json").out)["runs"][0]["state"] == "resume"


def test_an_old_runs_values_are_read_as_todays(tmp_path: Path) -> None:
    """A spec of which every key stands in the file, as a run folder's own does, is the same run as the one that was
    typed."""
    for key in ("seed", "inversion.until", "tokens.initializer", "text_lora.rank", "optimizer.d_coef"):
        _, spec = both(tmp_path, key)
        again = spec_of(tmp_path, {**dump(spec), "fluxrun": {"version": "0"}})
        assert make_plan(again, FACTS).key == make_plan(spec, FACTS).key
