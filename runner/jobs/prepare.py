"""From spec files to planned runs: gathers the facts each spec names, and every fault of every spec, before anything starts.

No torch: `fluxrun plan` is this and a printer.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runner.base.files import (
    BUILTIN,
    identity_of,
    local_folder,
)
from runner.base.layers import KNOWN
from runner.core import hub
from runner.core.errors import Fault, FluxrunError, SpecError, UnreachableError
from runner.core.notify import Target, target_faults
from runner.core.tracebacks import summary_line
from runner.data import class_images, sources
from runner.data.images import DataError, Pictures, measure
from runner.data.sources import COLUMNAR, DatasetSource
from runner.jobs.bases import BaseRegistry, OpenedBase
from runner.jobs.batch_faults import batch_faults
from runner.jobs.job import Job, Seen
from runner.plan.build import PlanError, make_plan
from runner.plan.phases import Facts, Plan
from runner.runs.inputs import read_inputs
from runner.runs.run import MISMATCH_REMEDIES, Run
from runner.spec.loader import Loaded, load_all, load_text, overlaps, path_at
from runner.spec.run_names import RunsThere, name_fault
from runner.spec.schema import Spec

DATA = ("data.source", "data.config", "data.split", "data.image_column", "data.caption_column", "data.prompt")
# What else a fault is found out from: where one of these keys is faulty itself, nothing can be said.
READS: dict[str, tuple[str, ...]] = {
    "tokens": DATA,
    "data.holdout": DATA,
    "train.epochs": DATA,
    "lora.layers": ("model.base", "lora.until"),
    "prior.images": ("data.source",),
    "prior.prompt": ("prior.images",),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
Shared = dict[
    DatasetSource, "Pictures | list[tuple[str, str]] | UnreachableError | None"
]  # what each data set came to, read once


def prepare_jobs(paths: Sequence[Path], runs: Path, *, fetch: bool, fresh: bool) -> list[Job]:
    """Raises SpecError with all faults of all specs. `fetch`: hub data sets are loaded and
    the login for a push is tried, so that they can be checked."""
    seen, faults = inspect_specs(paths, runs, fetch=fetch, fresh=fresh)
    if faults:
        raise SpecError(faults)
    return jobs_of(seen)


def jobs_of(seen: Sequence[Seen]) -> list[Job]:
    """Those that have a plan."""
    return [
        Job(one.source.file, one.spec, one.plan, one.pictures, one.run, one.verdict, one.source, one.doubts)
        for one in seen
        if one.plan and one.verdict
    ]


def inspect_specs(paths: Sequence[Path], runs: Path, *, fetch: bool, fresh: bool) -> tuple[list[Seen], list[Fault]]:
    """Every run asked for, and every fault of every spec."""
    loaded, faults = load_all(paths, runs)
    there = RunsThere.below(runs)
    shared: Shared = {}
    seen = []
    bases = BaseRegistry()
    login = functools.cache(hub.login)  # once for all specs
    for one in loaded:
        found, told = _inspect_all(one, runs, there, bases, fetch, fresh, shared)
        if fetch and found.spec.hub.push and found.plan and not _is_done(found) and (wrong := login().fault):
            found = replace(found, bad=found.bad | {"hub.push"})
            told = [*told, one.source.fault("hub.push", wrong)]
        seen.append(found)
        faults += told
    owner = login().name if fetch and sum(one.spec.hub.push for one in seen) > 1 else ""
    return seen, list(dict.fromkeys([*faults, *batch_faults(seen, owner)]))  # the runs of a sweep share many


def _inspect_all(
    loaded: Loaded, runs: Path, there: RunsThere, bases: BaseRegistry, fetch: bool, fresh: bool, shared: Shared
) -> tuple[Seen, list[Fault]]:
    """What goes wrong in looking at one run is that run's fault, so that the others are told too."""
    try:
        return _inspect(loaded, runs, there, bases, fetch, fresh, shared)
    except Exception as error:
        spec = loaded.spec
        fault = loaded.source.fault("", f"this run cannot be looked at: {summary_line(error)}")
        return Seen(loaded.source, spec, frozenset({"model", "data"}), None, None, Run(runs, spec.name), None), [fault]


def notify_faults(jobs: Sequence[Job], allow_commands: bool) -> list[Fault]:
    """Of runs that will tell somebody. `allow_commands`: as the option of the command line."""
    return [
        job.source.fault(*told)
        for job in jobs
        if job.verdict.state != "done"
        for told in target_faults(Target(**job.spec.notify.model_dump()), allow_commands)
    ]


def _is_done(seen: Seen) -> bool:
    return seen.verdict is not None and seen.verdict.state == "done"


def _inspect(
    loaded: Loaded, runs: Path, there: RunsThere, bases: BaseRegistry, fetch: bool, fresh: bool, shared: Shared
) -> tuple[Seen, list[Fault]]:
    spec, source = _absolute(loaded), loaded.source
    told = _base_faults(spec)
    asked = data_source(spec)
    near = source.place("data.source")[0].parent
    if any(overlaps(key, bad) for key in DATA for bad in loaded.bad):
        found: Pictures | list[tuple[str, str]] | UnreachableError | None = _misplaced(asked, near)
    else:
        if asked not in shared:  # a sweep reads its data once
            shared[asked] = _misplaced(asked, near) or _pictures(asked, fetch)
        found = shared[asked]
    doubts = []
    if isinstance(found, UnreachableError):
        if spec.train.epochs is not None:
            told.append(
                ("data.source", f"{found}, and train.epochs counts its pictures; connect, or set train.steps instead")
            )
        doubts, found = [("data.source", f"{found}; the run fails if it cannot, and the others go on")], None
    if isinstance(found, list):
        told += found
        found = None
    if wrong := name_fault(spec.name, runs, there, swept=bool(source.swept)):
        told.append(("name", wrong))
    told += [*_repository_faults(spec), *_nested_folders(spec, runs)]
    pictures = found.hold_out(spec.data.holdout) if found else None
    plan = verdict = None
    broken = bases.of(spec).faults
    try:
        plan = None if broken else plan_of(spec, pictures, bases)
    except PlanError as error:
        told += [fault for fault in error.faults if found is not None or not told or fault[0] != "train.epochs"]
    except FluxrunError as error:  # an image whose size cannot be read
        told.append(("data.source", str(error)))
    told += broken
    run = Run(runs, spec.name)
    told = [fault for fault in told if not any(overlaps(key, bad) for key in _reads(fault[0]) for bad in loaded.bad)]
    faults = [source.fault(*fault) for fault in told]
    if faults or loaded.bad:
        plan = None
    if plan:
        verdict = run.status_for(spec, plan, lambda: read_inputs(spec, pictures))
        if verdict.state in ("new", "resume"):
            verdict = run.active_status() or verdict
        if verdict.state == "changed" and not fresh:
            faults.append(
                source.fault("name", f"{run.folder} holds another run: {verdict.reason}; {MISMATCH_REMEDIES}")
            )
    based = all(key != "model.base" for key, _ in told)  # else nobody can say which base has made class images
    if based and (verdict is None or verdict.state != "done"):  # a run that is done looks at them no more
        prior = [fault for fault in _prior_faults(spec, runs) if not any(overlaps(fault[0], bad) for bad in loaded.bad)]
        told += prior
        faults += [source.fault(key, message) for key, message in prior]
        plan, verdict = (None, None) if prior else (plan, verdict)
    bad = loaded.bad | {key for key, _ in told}
    return Seen(source, spec, frozenset(bad), pictures, plan, run, verdict, tuple(doubts), loaded.bad), faults


def _reads(key: str) -> tuple[str, ...]:
    return (key, *READS.get(key, READS.get(key.partition(".")[0], ())))


def _absolute(loaded: Loaded) -> Spec:
    """The spec with its paths resolved, so that the run's own copy of it can be read from anywhere."""
    spec, source = loaded.spec, loaded.source
    folder = path_at(spec.data.source, source, "data.source")
    base = path_at(spec.model.base, source, "model.base")
    update: dict[str, object] = {
        "data": spec.data.model_copy(update={"source": str(folder)} if folder.exists() else {}),
        "model": spec.model.model_copy(update={"base": str(base)} if base.exists() else {}),
    }
    if spec.prior is not None:  # need not exist yet
        images = path_at(spec.prior.images, source, "prior.images")
        update["prior"] = spec.prior.model_copy(update={"images": str(images)})
    return spec.model_copy(update=update)


def draft_plan(text: str, file: Path) -> Spec:
    """The spec that `text` would be as `file`, with absolute paths. Raises SpecError with every fault."""
    return _absolute(load_text(text, file))


def plan_of(spec: Spec, pictures: Pictures | None, bases: BaseRegistry | None = None) -> Plan:
    """Raises PlanError with everything that is wrong, FluxrunError where an image cannot be measured."""
    return make_plan(spec, _facts(spec, pictures, (bases or BaseRegistry()).of(spec)))


def data_source(spec: Spec) -> DatasetSource:
    own = spec.data
    return DatasetSource(own.source, own.config, own.split, own.image_column, own.caption_column, own.prompt)


def _prior_faults(spec: Spec, runs: Path) -> list[tuple[str, str]]:
    own = spec.prior
    if own is None:
        return []
    if wrong_place := class_images.misplaced_folder(Path(own.images), own.count, runs):
        return [("prior.images", wrong_place)]
    base = identity_of(spec.model.base, spec.model.revision)
    wrong = class_images.prompt_disagreement(Path(own.images), own.prompt, base)
    return [wrong] if wrong else []


def _repository_faults(spec: Spec) -> list[tuple[str, str]]:
    wrong = hub.repository_id_fault(spec.hub.repo) if spec.hub.push and spec.hub.repo else None
    return [("hub.repo", wrong)] if wrong else []


def _nested_folders(spec: Spec, runs: Path) -> list[tuple[str, str]]:
    """Pictures that runs make must not become training pictures of the next one."""
    source = Path(spec.data.source)
    if not source.is_dir():
        return []
    inside = [
        ("data.source", f"it holds the runs folder {runs}", "put the images into a folder of their own, or give --runs")
    ]
    if spec.prior is not None:
        inside.append(("prior.images", f"it lies inside data.source {source}", "name a folder elsewhere"))
    folders = [runs.resolve(), *([Path(spec.prior.images)] if spec.prior else [])]
    return [
        (key, f"{what}, so pictures made there would be trained on; {way_out}")
        for (key, what, way_out), folder in zip(inside, folders, strict=True)
        if folder.is_relative_to(source)
    ]


def _base_faults(spec: Spec) -> list[tuple[str, str]]:
    base = spec.model.base
    folder = local_folder(base)
    if folder is None and (base.startswith("builtin:") or not HUB_ID.fullmatch(base)):
        return [
            (
                "model.base",
                f"no such model (found {base!r}); allowed are a hub id (owner/name), a folder beside the spec, {', '.join(BUILTIN)}",
            )
        ]
    if folder is None and base not in KNOWN and (wrong := hub.repository_id_fault(base)):
        return [("model.base", wrong)]
    if folder is not None and not (folder / "model_index.json").is_file():
        return [("model.base", f"{folder} holds no model_index.json; name a model in diffusers' layout (FluxPipeline)")]
    return []


def _misplaced(asked: DatasetSource, near: Path) -> list[tuple[str, str]] | None:
    """What is wrong with the name of a data set, (key, message) each; None where there may be one."""
    path = Path(asked.text)
    if path.is_absolute() and path.exists():
        if path.is_file() and path.suffix not in COLUMNAR:
            wanted = "allowed are a folder, a .parquet or .arrow file, a hub data set"
            return [("data.source", f"not a folder (found {asked.text!r}); {wanted}")]
        return None
    inside = (near / asked.text.split("/")[0]).is_dir()  # "data/icnos" is a misspelt folder, no hub id
    if inside or not HUB_ID.fullmatch(asked.text):
        beside = [path.name for path in near.iterdir() if path.is_dir()]
        guess = difflib.get_close_matches(Path(asked.text).name, beside, 1)
        return [
            (
                "data.source",
                f"no such folder (found {asked.text!r}); allowed are a folder (relative to the spec) or a hub data set "
                f"(owner/name){f'; did you mean {guess[0]}?' if guess else ''}",
            )
        ]
    if wrong := hub.repository_id_fault(asked.text):
        return [("data.source", wrong)]
    return None


def _pictures(asked: DatasetSource, fetch: bool) -> Pictures | list[tuple[str, str]] | UnreachableError | None:
    """The data set, None where only the hub has it, UnreachableError where that does not answer, or what is wrong with it: (key,
    message) each."""
    try:
        return sources.read_source(asked) if fetch or Path(asked.text).exists() else None
    except UnreachableError as error:
        return error
    except DataError as error:
        return list(error.faults)


def _facts(spec: Spec, pictures: Pictures | None, base: OpenedBase) -> Facts:
    """Raises FluxrunError where buckets ask for the size of an image that cannot be read."""
    if pictures is None:
        return Facts(None, None, sources.source_fingerprint(data_source(spec)), base.print, base.config, base.clip)
    count = len(pictures.items) + len(pictures.held)
    sizes = tuple(measure(picture) for picture in pictures.items) if spec.data.buckets else None
    return Facts(pictures.captions, count, pictures.fingerprint, base.print, base.config, base.clip, sizes)
