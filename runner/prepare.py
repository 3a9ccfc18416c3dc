"""From spec files to planned runs: gathers the facts each spec names, and every fault of every spec, before anything starts.

No torch: `fluxrun plan` is this and a printer.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner import classfolder, data, hub, sources
from runner.basefiles import BUILTIN, clip_config, fingerprint, local_folder, transformer_config
from runner.data import DataError, Pictures
from runner.digest import key_of
from runner.errors import Fault, FluxrunError, SpecError
from runner.plan import Facts, Plan, PlanError, make_plan
from runner.rundir import WAYS_OUT, Run, Verdict
from runner.sources import COLUMNAR, Source
from runner.spec import Spec
from runner.specload import Loaded, load_all, local_path, touches

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Job:
    """One run to be: its spec (paths absolute), plan and folder, and what the folder says of it."""

    file: Path
    spec: Spec
    plan: Plan
    pictures: Pictures | None  # None: a hub data set not fetched yet
    run: Run
    verdict: Verdict


def prepare(paths: Sequence[Path], runs: Path, *, fetch: bool, fresh: bool) -> list[Job]:
    """Raises SpecError with all faults of all specs. `fetch`: hub data sets are loaded and
    the login for a push is tried, so that they can be checked."""
    loaded, faults = load_all(paths)
    jobs: list[Job] = []
    ask_hub = functools.cache(hub.login_fault)  # once for all specs
    shared: dict[Source, Pictures | list[str] | None] = {}
    for one in loaded:
        found = _prepare_one(one, runs, fetch, fresh, shared)
        if isinstance(found, Job) and fetch and found.spec.hub.push and found.verdict.state != "done":
            wrong = ask_hub()
            found = [one.source.fault("hub.push", wrong)] if wrong else found
        if isinstance(found, Job):
            jobs.append(found)
        else:
            faults += found
    if faults:
        raise SpecError(faults)
    return jobs


def _prepare_one(
    loaded: Loaded, runs: Path, fetch: bool, fresh: bool, shared: dict[Source, Pictures | list[str] | None]
) -> Job | list[Fault]:
    spec, source = _absolute(loaded), loaded.source
    told = _base_faults(spec)
    asked = data_source(spec)
    if asked not in shared:  # a sweep reads its data once
        shared[asked] = _pictures(asked, source.file.parent, fetch)
    pictures = shared[asked]
    if isinstance(pictures, list):
        told += [("data.source", message) for message in pictures]
        pictures = None
    told += [*_prior_faults(spec), *_nested_folders(spec, runs)]
    found = pictures
    try:
        pictures = found.hold_out(spec.data.holdout) if found else None
        plan = plan_of(spec, pictures)
    except PlanError as error:
        told += [fault for fault in error.faults if found is not None or not told or fault[0] != "train.epochs"]
    except FluxrunError as error:  # an image whose size cannot be read
        told.append(("data.source", str(error)))
    if told or loaded.bad:
        return [source.fault(*fault) for fault in told if not any(touches(fault[0], bad) for bad in loaded.bad)]
    run = Run(runs, spec.name)
    verdict = run.verdict(spec, plan)
    if verdict.state == "changed" and not fresh:
        return [source.fault("name", f"{run.folder} holds another run: {verdict.reason}; {WAYS_OUT}")]
    return Job(source.file, spec, plan, pictures, run, verdict)


def _absolute(loaded: Loaded) -> Spec:
    """The spec with its paths resolved, so that the run's own copy of it can be read from anywhere."""
    spec, source = loaded.spec, loaded.source
    folder, base = local_path(spec.data.source, source), local_path(spec.model.base, source)
    update: dict[str, object] = {
        "data": spec.data.model_copy(update={"source": str(folder)} if folder else {}),
        "model": spec.model.model_copy(update={"base": str(base)} if base else {}),
    }
    if spec.prior is not None:  # need not exist yet
        images = (source.file.parent / Path(spec.prior.images).expanduser()).resolve()
        update["prior"] = spec.prior.model_copy(update={"images": str(images)})
    return spec.model_copy(update=update)


def plan_of(spec: Spec, pictures: Pictures | None) -> Plan:
    """Raises PlanError with everything that is wrong, FluxrunError where an image cannot be measured."""
    return make_plan(spec, _facts(spec, pictures))


def data_source(spec: Spec) -> Source:
    own = spec.data
    return Source(own.source, own.config, own.split, own.image_column, own.caption_column, own.prompt)


def _prior_faults(spec: Spec) -> list[tuple[str, str]]:
    own = spec.prior
    if own is None:
        return []
    wrong = classfolder.disagreement(Path(own.images), own.prompt)
    return [("prior.prompt", wrong)] if wrong else []


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
    if folder is not None and not (folder / "model_index.json").is_file():
        return [
            ("model.base", f"{folder} holds no model_index.json; wanted is a model in diffusers' layout (FluxPipeline)")
        ]
    return []


def _pictures(asked: Source, near: Path, fetch: bool) -> Pictures | list[str] | None:
    """The data set, None where only the hub has it, or what is wrong with it."""
    path = Path(asked.text)
    try:
        if path.is_absolute() and path.exists():
            if path.is_file() and path.suffix not in COLUMNAR:
                return [
                    f"no folder (found {asked.text!r}); allowed are a folder, a .parquet or .arrow file, a hub data set"
                ]
            return sources.read(asked)
        inside = (near / asked.text.split("/")[0]).is_dir()  # "data/icnos" is a misspelt folder, no hub id
        if inside or not HUB_ID.fullmatch(asked.text):
            beside = [path.name for path in near.iterdir() if path.is_dir()]
            guess = difflib.get_close_matches(Path(asked.text).name, beside, 1)
            return [
                f"no such folder (found {asked.text!r}); allowed are a folder (relative to the spec) or a hub data set "
                f"(owner/name){f'; did you mean {guess[0]}?' if guess else ''}"
            ]
        return sources.read(asked) if fetch else None
    except DataError as error:
        return list(error.messages)
    except UnicodeDecodeError as error:
        return [f"a caption file is not UTF-8 ({error})"]


def _facts(spec: Spec, pictures: Pictures | None) -> Facts:
    """Raises FluxrunError where buckets ask for the size of an image that cannot be read."""
    folder = local_folder(spec.model.base)
    base = fingerprint(folder) if folder else key_of("hub", spec.model.base, spec.model.revision, spec.model.variant)
    config, clip = transformer_config(spec.model.base, folder), clip_config(folder)
    if pictures is None:
        return Facts(None, None, sources.fingerprint(data_source(spec)), base, config, clip)
    count = len(pictures.items) + len(pictures.held)
    sizes = tuple(data.measure(picture) for picture in pictures.items) if spec.data.buckets else None
    return Facts(pictures.captions, count, pictures.fingerprint, base, config, clip, sizes)
