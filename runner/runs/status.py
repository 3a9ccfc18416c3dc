"""What a run folder says of a plan: new, done, can be resumed, or holds another run, and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runner.core import locks
from runner.core.files import read_json
from runner.core.process_identity import Process
from runner.plan.keys import NOT_IN_KEY, OPEN_ENDED, RECOMPUTING, SPAN_KEYS
from runner.plan.phases import Plan
from runner.runs.inputs import TrainingInputs, describe_changes
from runner.runs.resume_advice import resume_advice
from runner.runs.run import Run
from runner.runs.spec_file import read_spec_tables
from runner.runs.state import read_state
from runner.spec.defaults import DERIVED_DEFAULTS, is_default
from runner.spec.schema import Spec, dump
from runner.spec.tables import flatten

ReadInputs = Callable[[], TrainingInputs]

MISMATCH_REMEDIES = (
    "give this spec another `name`, undo the change, or queue it with --fresh, which moves the old folder aside"
)


@dataclass(frozen=True)
class RunStatus:
    """state: "new"; "done": nothing is left to do; "resume": the same training, to be started or continued; "changed":
    the folder holds another run; "running" and "waiting": a queue has it now."""

    state: Literal["new", "done", "resume", "changed", "running", "waiting"]
    reason: str


def status_of(run: Run, spec: Spec, plan: Plan, inputs: ReadInputs | None = None) -> RunStatus:
    """Compare a run folder with a plan. A run is done if its key is the plan's and its exports exist.

    inputs: what it would be trained on now, read only where a refusal has to name what changed.
    """
    if not run.spec_file.is_file():
        return RunStatus("new", "no run folder yet")
    if _is_done(run, plan):
        return RunStatus("done", "same spec, data and base; its exports are there")
    step, phase_key = run.newest_checkpoint()
    planned = read_json(run.plan_file)
    if planned.get("training_key") == plan.training_key:
        if planned.get("key") != plan.key:
            return RunStatus("resume", "what is exported or shown changed; the training is kept")
        last = f"interrupted; last checkpoint at step {step} of {plan.steps}"
        return RunStatus("resume", last if step else "no checkpoint yet")
    try:
        changed = changed_keys(run, spec)
    except (ValueError, RecursionError) as error:
        return RunStatus("changed", f"its spec.toml cannot be read ({error})")
    stops = {phase.key: phase.stop for phase in plan.training}
    can_resume = step <= stops.get(phase_key, -1)
    if not changed and (can_resume or not (planned or step)):  # plan.json was lost, or a queue died while it wrote it
        return RunStatus("resume", f"its plan.json is lost; last checkpoint at step {step} of {plan.steps}")
    changed_inputs = _changed_inputs(run, spec, inputs)
    reason = "; ".join([*changed.values(), *changed_inputs])
    if not changed:
        return RunStatus("changed", reason or _unknown_change(spec))
    if changed_inputs or not changed.keys() <= set(SPAN_KEYS):
        return RunStatus("changed", reason)
    if can_resume:
        return RunStatus("resume", f"{reason}; goes on from step {step} of {plan.steps}")
    return RunStatus("changed", f"{reason}{_why_span_is_fixed(planned, spec, plan, step)}")


def _is_done(run: Run, plan: Plan) -> bool:
    state = read_state(run.state_file)
    if state is None or state.state != "done" or state.plan_key != plan.key or state.exports is None:
        return False
    return all((run.folder / name).is_file() for name in state.exports)


def changed_keys(run: Run, spec: Spec) -> dict[str, str]:
    """Keys that change the result and differ from the run's own spec, each with "KEY: old -> new".

    Left out are derived defaults that follow another changed key, as lora.alpha follows lora.rank where it is not set.
    Raises ValueError or RecursionError where the run's spec cannot be read.
    """
    old_tables, new_tables = read_spec_tables(run.spec_file), dump(spec)
    old, new = flatten(old_tables), flatten(new_tables)
    skipped = NOT_IN_KEY if spec.model.compile else (*NOT_IN_KEY, *RECOMPUTING)
    keys = [key for key in {**old, **new} if not any(key == skip or key.startswith(f"{skip}.") for skip in skipped)]
    differing = [key for key in keys if old.get(key) != new.get(key)]
    derived = [
        key
        for key, default in DERIVED_DEFAULTS.items()
        if {*default.causes} & set(differing) and all(is_default(key, tables) for tables in (old_tables, new_tables))
    ]
    return {
        key: f"{key}: {_value_text(old.get(key))} -> {_value_text(new.get(key))}"
        for key in differing
        if key not in derived
    }


def _changed_inputs(run: Run, spec: Spec, inputs: ReadInputs | None) -> list[str]:
    """Images, captions and files of the base that differ from those in inputs.json, if the run has one."""
    old = TrainingInputs.from_json(read_json(run.inputs_file))
    if old is None or inputs is None:
        return []
    return describe_changes(old, inputs(), flatten(read_spec_tables(run.spec_file)), flatten(dump(spec)))


def _unknown_change(spec: Spec) -> str:
    """For a folder without inputs.json."""
    text = "the images, the captions or the base model are not the ones it was trained on"
    if spec.model.gradient_checkpointing:
        text += ", or an earlier fluxrun began it, for which model.gradient_checkpointing made another run"
    return text


def _why_span_is_fixed(planned: Mapping[str, Any], spec: Spec, plan: Plan, step: int) -> str:
    """Why training cannot go on where only the ends of phases changed, and what to set so that it can."""
    if spec.schedule.name not in OPEN_ENDED:
        return f"; the {spec.schedule.name} schedule depends on where it ends"
    return "".join(f"; {line}" for line in resume_advice(planned, spec, plan, step))


def _value_text(value: Any) -> str:
    return "not set" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def active_status(run: Run) -> RunStatus | None:
    """ "running" or "waiting" where another process has the run now; else None."""
    holder, state = run.holder(), run.state()
    if holder is None or holder == Process.current() or state.state not in ("running", "waiting"):
        return None
    host = "" if holder.is_local else f" on {holder.host}"
    if state.state == "waiting":
        return RunStatus("waiting", f"in the queue of process {holder.pid}{host}")
    pid = locks.lock_holder(run.lock_file) or holder.pid
    since = state.attempt_started
    started = time.strftime(", since %Y-%m-%d %H:%M", time.localtime(since)) if since else ""
    step, steps = ("?" if number is None else f"{number:.0f}" for number in (state.step, state.steps))
    return RunStatus("running", f"process {pid}{host} trains it{started}; at step {step} of {steps}")
