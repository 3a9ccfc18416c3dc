"""A queue claims a run: it makes the folder, writes what the run is, and takes the lease for the next attempt."""

from __future__ import annotations

from collections.abc import Callable

from runner.core import files
from runner.core.errors import LockHeldError, RunMismatchError
from runner.core.hashing import content_key
from runner.core.process_identity import Process
from runner.plan.description import as_json
from runner.plan.phases import Plan
from runner.runs.run import Run
from runner.runs.state import FORMAT
from runner.runs.status import MISMATCH_REMEDIES, ReadInputs, status_of
from runner.spec.origins import annotated
from runner.spec.schema import VERSION_TABLE, Spec, dump


def _unknown_origin(_: str) -> str:
    return "not told"


def claim_run(
    run: Run,
    spec: Spec,
    plan: Plan,
    version: str,
    origin: Callable[[str], str] = _unknown_origin,
    inputs: ReadInputs | None = None,
) -> int:
    """Returns the number of the attempt that this process may now start.

    version: fluxrun's. origin: in words, where the value of a dotted key came from. inputs: what the run is trained on.
    Raises LockHeldError where another process has the run, RunMismatchError where the folder holds another run.
    """
    run.refuse_links()
    files.make_folder(run.folder)  # nowhere else: a folder that vanishes while its run trains must not be made again
    try:
        with run.locked():
            if (holder := run.holder()) and holder != Process.current():
                raise run.locked_error()
            run.take_stop_request()  # meant for an earlier queue
            _write_claim(run, spec, plan, version, origin, inputs)
            return run.take_lease()
    except LockHeldError:  # raised by the lock, without the queue that started its holder
        raise run.locked_error() from None


def _write_claim(
    run: Run, spec: Spec, plan: Plan, version: str, origin: Callable[[str], str], inputs: ReadInputs | None
) -> None:
    if (status := status_of(run, spec, plan, inputs)).state == "changed":
        raise RunMismatchError(f"{run.folder} holds another run ({status.reason}); {MISMATCH_REMEDIES}")
    resolved = {**dump(spec), VERSION_TABLE: {"version": version}}

    def origin_of(key: str) -> str:
        return "what wrote this file" if key.startswith(f"{VERSION_TABLE}.") else origin(key)

    keys = {"key": plan.key, "training_key": plan.training_key}
    files.write_json(run.plan_file, {"format": FORMAT, **as_json(plan), **keys})
    if inputs is not None:
        files.write_json(run.inputs_file, {"format": FORMAT, **inputs().as_json()})
    files.write_text(run.spec_file, annotated(resolved, origin_of))  # after the plan: a folder with a spec is a run
    digest = content_key(str(sorted(map(str, dump(spec).items()))))
    run.write_state(
        "waiting", **run.progress(), plan_key=plan.key, spec_digest=digest, steps=plan.steps, base=spec.model.base
    )
