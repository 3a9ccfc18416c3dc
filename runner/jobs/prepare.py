"""From spec files to planned jobs. Reads what each spec names and collects every fault of every spec before anything
starts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from runner.base.files import BUILTIN, identity_of, local_folder
from runner.base.layers import KNOWN_BASES
from runner.core import hub
from runner.core.errors import Fault, FluxrunError, SpecError
from runner.core.notify import Target, target_faults
from runner.core.tracebacks import summary_line
from runner.data import class_images, sources
from runner.data.images import Pictures, measure
from runner.jobs.bases import BaseRegistry, OpenedBase
from runner.jobs.batch_faults import batch_faults
from runner.jobs.data_sets import HUB_ID, DataSetRegistry, OpenedDataSet, data_source, name_faults
from runner.jobs.job import Job, Planned
from runner.plan.build import make_plan
from runner.plan.faults import KeyMessage, PlanError
from runner.plan.phases import Facts, Plan
from runner.runs.inputs import read_inputs
from runner.runs.run import Run
from runner.runs.status import MISMATCH_REMEDIES, active_status, status_of
from runner.spec.build import LoadedSpec
from runner.spec.loader import load_all, load_text, path_at
from runner.spec.run_names import ExistingRuns, name_fault
from runner.spec.schema import Spec
from runner.spec.tables import overlaps

DATA_KEYS = ("data.source", "data.config", "data.split", "data.image_column", "data.caption_column", "data.prompt")
# The keys that a fault also depends on: where one of them is faulty itself, the fault is not reported.
DEPENDS_ON: dict[str, tuple[str, ...]] = {
    "tokens": DATA_KEYS,
    "data.holdout": DATA_KEYS,
    "train.epochs": DATA_KEYS,
    "lora.layers": ("model.base", "lora.until"),
    "prior.images": ("data.source",),
    "prior.prompt": ("prior.images",),
}


def prepare_jobs(paths: Sequence[Path], runs: Path, *, fetch: bool, fresh: bool) -> list[Job]:
    """Plan every run that the specs ask for.

    fetch: load hub data sets and try the login for a push, so that both can be checked. fresh: a folder that holds
    another run is no fault, since it will be archived. Raises SpecError with all faults of all specs.
    """
    jobs, faults = inspect_specs(paths, runs, fetch=fetch, fresh=fresh)
    if faults:
        raise SpecError(faults)
    return planned_jobs(jobs)


def planned_jobs(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.planned]


def inspect_specs(paths: Sequence[Path], runs: Path, *, fetch: bool, fresh: bool) -> tuple[list[Job], list[Fault]]:
    """Every run that the specs ask for, planned where nothing is wrong with it, and every fault of every spec."""
    loaded_specs, faults = load_all(paths, runs)
    inspector = _Inspector(runs, fetch=fetch, fresh=fresh)
    jobs = []
    login = functools.cache(hub.login)  # asked for once, by the first spec that pushes
    for loaded in loaded_specs:
        job, found = inspector.inspect_safely(loaded)
        if fetch and job.spec.hub.push and job.planned and not job.is_done and (wrong := login().fault):
            job = replace(job, faulty_keys=job.faulty_keys | {"hub.push"})
            found = [*found, loaded.source.fault("hub.push", wrong)]
        jobs.append(job)
        faults += found
    owner = login().name if fetch and sum(job.spec.hub.push for job in jobs) > 1 else ""
    return jobs, list(dict.fromkeys([*faults, *batch_faults(jobs, owner)]))  # the runs of a sweep share many


def notify_faults(jobs: Sequence[Job], allow_commands: bool) -> list[Fault]:
    """What is wrong with [notify] of the runs that are to be trained. allow_commands: as the command-line option."""
    return [
        job.source.fault(*fault)
        for job in jobs
        if not job.is_done
        for fault in target_faults(Target(**job.spec.notify.model_dump()), allow_commands)
    ]


class _Inspector:
    """Inspects the specs of one command; each data set, base and runs folder is read once for all of them."""

    def __init__(self, runs: Path, *, fetch: bool, fresh: bool) -> None:
        self.runs, self.fresh = runs, fresh
        self.run_names = ExistingRuns.below(runs)
        self.bases = BaseRegistry()
        self.data_sets = DataSetRegistry(fetch=fetch)

    def inspect_safely(self, loaded: LoadedSpec) -> tuple[Job, list[Fault]]:
        """An unforeseen error is this run's fault, so that the faults of the others are still reported."""
        try:
            return self._inspect(loaded)
        except Exception as error:
            spec = loaded.spec
            fault = loaded.source.fault("", f"this run could not be checked: {summary_line(error)}")
            job = Job(loaded.source, spec, Run(self.runs, spec.name), None, faulty_keys=frozenset({"model", "data"}))
            return job, [fault]

    def _inspect(self, loaded: LoadedSpec) -> tuple[Job, list[Fault]]:
        spec, source = _with_absolute_paths(loaded), loaded.source
        faults = _base_faults(spec)
        data_set = self._open_data(loaded, spec)
        data_faults, doubts = _data_faults(spec, data_set)
        faults += data_faults
        if wrong := name_fault(spec.name, self.runs, self.run_names, swept=bool(source.swept)):
            faults.append(("name", wrong))
        faults += [*_repository_faults(spec), *_nested_folder_faults(spec, self.runs)]
        pictures = data_set.pictures.hold_out(spec.data.holdout) if data_set.pictures else None
        plan, plan_faults = self._plan(spec, pictures, explained=bool(faults))
        faults = [fault for fault in [*faults, *plan_faults] if not _depends_on(fault[0], loaded.unreadable_keys)]
        job = Job(
            source, spec, Run(self.runs, spec.name), pictures, doubts=doubts, unreadable_keys=loaded.unreadable_keys
        )
        planned, other_run = None, list[Fault]()
        if plan and not faults and not loaded.unreadable_keys:
            planned, other_run = self._compare_with_folder(job, plan)
        prior_faults = list[KeyMessage]()
        # Where the base is faulty, the base that made the class images is not known. A run that is done reads none.
        if all(key != "model.base" for key, _ in faults) and not (planned and planned.status.state == "done"):
            prior_faults = [
                fault for fault in _prior_faults(spec, self.runs) if not _any_overlap(fault[:1], loaded.unreadable_keys)
            ]
        faulty_keys = loaded.unreadable_keys | {key for key, _ in [*faults, *prior_faults]}
        job = replace(job, planned=None if prior_faults else planned, faulty_keys=faulty_keys)
        own_faults, prior = ([source.fault(*fault) for fault in each] for each in (faults, prior_faults))
        return job, [*own_faults, *other_run, *prior]

    def _open_data(self, loaded: LoadedSpec, spec: Spec) -> OpenedDataSet:
        source, folder = data_source(spec), loaded.source.location("data.source")[0].parent
        if _any_overlap(DATA_KEYS, loaded.unreadable_keys):
            return OpenedDataSet(faults=name_faults(source, folder))
        return self.data_sets.of(source, folder)

    def _plan(
        self, spec: Spec, pictures: Pictures | None, *, explained: bool
    ) -> tuple[Plan | None, Sequence[KeyMessage]]:
        """The plan, or what makes it impossible. explained: other faults may be why the pictures cannot be counted."""
        if broken := self.bases.of(spec).faults:
            return None, broken
        try:
            return plan_of(spec, pictures, self.bases), ()
        except PlanError as error:
            known = pictures is not None or not explained
            return None, [fault for fault in error.faults if known or fault[0] != "train.epochs"]
        except FluxrunError as error:  # an image whose size cannot be read
            return None, [("data.source", str(error))]

    def _compare_with_folder(self, job: Job, plan: Plan) -> tuple[Planned, list[Fault]]:
        """The plan with what the run folder says of it; a fault where the folder holds another run."""
        status = status_of(job.run, job.spec, plan, lambda: read_inputs(job.spec, job.pictures))
        if status.state in ("new", "resume"):
            status = active_status(job.run) or status
        faults = []
        if status.state == "changed" and not self.fresh:
            text = f"{job.run.folder} holds another run: {status.reason}; {MISMATCH_REMEDIES}"
            faults.append(job.source.fault("name", text))
        return Planned(plan, status), faults


def _depends_on(key: str, bad_keys: frozenset[str]) -> bool:
    """Whether a fault of `key` depends on a key that is faulty itself."""
    return _any_overlap((key, *DEPENDS_ON.get(key, DEPENDS_ON.get(key.partition(".")[0], ()))), bad_keys)


def _any_overlap(keys: Sequence[str], bad_keys: frozenset[str]) -> bool:
    return any(overlaps(key, bad) for key in keys for bad in bad_keys)


def _with_absolute_paths(loaded: LoadedSpec) -> Spec:
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


def draft_spec(text: str, file: Path) -> Spec:
    """The spec that `text` would be as `file`, with absolute paths. Raises SpecError with every fault."""
    return _with_absolute_paths(load_text(text, file))


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan_of(spec: Spec, pictures: Pictures | None, bases: BaseRegistry | None = None) -> Plan:
    """Raises PlanError with everything that is wrong, FluxrunError where an image cannot be measured."""
    return make_plan(spec, facts_of(spec, pictures, (bases or BaseRegistry()).of(spec)))


def facts_of(spec: Spec, pictures: Pictures | None, base: OpenedBase) -> Facts:
    """Raises FluxrunError where buckets ask for the size of an image that cannot be read."""
    if pictures is None:
        return Facts(
            None, None, sources.source_fingerprint(data_source(spec)), base.fingerprint, base.config, base.clip
        )
    count = len(pictures.items) + len(pictures.held_out)
    sizes = tuple(measure(picture) for picture in pictures.items) if spec.data.buckets else None
    return Facts(pictures.captions, count, pictures.fingerprint, base.fingerprint, base.config, base.clip, sizes)


# ---- faults of one spec ----------------------------------------------------------------------------------------------


def _base_faults(spec: Spec) -> list[KeyMessage]:
    base = spec.model.base
    folder = local_folder(base)
    if folder is None and (base.startswith("builtin:") or not HUB_ID.fullmatch(base)):
        allowed = f"allowed are a hub id (owner/name), a folder beside the spec, {', '.join(BUILTIN)}"
        return [("model.base", f"no such model (found {base!r}); {allowed}")]
    if folder is None and base not in KNOWN_BASES and (wrong := hub.repository_id_fault(base)):
        return [("model.base", wrong)]
    if folder is not None and not (folder / "model_index.json").is_file():
        return [("model.base", f"{folder} holds no model_index.json; name a model in diffusers' layout (FluxPipeline)")]
    return []


def _data_faults(spec: Spec, data_set: OpenedDataSet) -> tuple[Sequence[KeyMessage], tuple[KeyMessage, ...]]:
    """(faults, doubts). A hub that does not answer is a fault only where its pictures must be counted for the plan."""
    unreachable = data_set.unreachable
    if unreachable is None:
        return data_set.faults, ()
    faults = []
    if spec.train.epochs is not None:
        text = f"{unreachable}, and train.epochs counts its pictures; connect, or set train.steps instead"
        faults.append(("data.source", text))
    return faults, (("data.source", f"{unreachable}; the run fails if it cannot, and the others go on"),)


def _prior_faults(spec: Spec, runs: Path) -> list[KeyMessage]:
    prior = spec.prior
    if prior is None:
        return []
    folder = Path(prior.images)
    if wrong_place := class_images.folder_fault(folder, prior.count, runs):
        return [("prior.images", wrong_place)]
    base = identity_of(spec.model.base, spec.model.revision)
    fault = class_images.note_fault(folder, prior.prompt, base)
    return [fault] if fault else []


def _repository_faults(spec: Spec) -> list[KeyMessage]:
    wrong = hub.repository_id_fault(spec.hub.repo) if spec.hub.push and spec.hub.repo else None
    return [("hub.repo", wrong)] if wrong else []


def _nested_folder_faults(spec: Spec, runs: Path) -> Iterator[KeyMessage]:
    """Pictures that runs make must not become training pictures of the next one."""
    source = Path(spec.data.source)
    if not source.is_dir():
        return
    so = "so pictures made there would be trained on"
    if runs.resolve().is_relative_to(source):
        remedy = "put the images into a folder of their own, or give --runs"
        yield "data.source", f"it holds the runs folder {runs}, {so}; {remedy}"
    if spec.prior is not None and Path(spec.prior.images).is_relative_to(source):
        yield "prior.images", f"it lies inside data.source {source}, {so}; name a folder elsewhere"
