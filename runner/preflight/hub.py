"""Whether the base can be fetched from the hub, and whether the hub and W&B have a login that may write."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from runner.base.files import PARTS
from runner.core import hub
from runner.core.humanize import format_bytes
from runner.jobs.job import Job
from runner.preflight.finding import Finding, Level, at

DOWNLOADED = ("model_index.json", *(f"{part}/*" for part in PARTS))  # patterns of the files that opening a base fetches
WANDB_HOST = "api.wandb.ai"


def hub_cache() -> Path:
    """The folder that the hub's client downloads into."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def check_access(job: Job, folder: Path | None) -> tuple[list[Finding], int]:
    """(findings, bytes to fetch) of a base that is not complete on this disk. folder: of what is there of it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    model = job.spec.model
    where = "only partly on this disk" if folder else "not on this disk"

    def no_download(level: Level, message: str, key: str = "model.base") -> tuple[list[Finding], int]:
        return [at(job.source, level, key, message)], 0

    if hub.offline():
        return no_download(
            "error",
            f"{model.base} is {where}, and HF_HUB_OFFLINE forbids fetching it; take that variable away, or name a folder",
        )
    hub.set_up_client(hub.ANSWER_TIMEOUT)
    api = HfApi()
    try:
        api.auth_check(model.base)
        info = api.model_info(model.base, revision=model.revision, files_metadata=True, timeout=hub.ANSWER_TIMEOUT)
    except GatedRepoError:
        way = (
            "and accept its licence" if logged_in() else "accept its licence, and log in (`hf auth login` or HF_TOKEN)"
        )
        return no_download(
            "error", f"{model.base} is gated, and this login may not read it; open {api.endpoint}/{model.base}, {way}"
        )
    except RevisionNotFoundError:
        return no_download(
            "error",
            f"{model.base} has no such revision (found {model.revision!r}); name a branch, tag or commit of it",
            "model.revision",
        )
    except RepositoryNotFoundError:
        return no_download(
            "error",
            f"the hub has no model of this name, or this login may not see it (found {model.base!r}); correct the name, or log "
            "in (`hf auth login`)",
        )
    except Exception as error:
        # The client has many other exceptions; none of them says that the base cannot be fetched.
        return no_download(
            "warning",
            f"{model.base} is {where}, and whether it can be fetched is unknown: the hub does not answer ({hub.describe_error(error)}); "
            "the run fails if it cannot, and the others go on",
        )
    files = [file for file in info.siblings or () if any(fnmatch(file.rfilename, glob) for glob in DOWNLOADED)]
    download = sum(file.size or 0 for file in files)
    if folder:
        download = max(0, download - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    return [
        at(job.source, "note", "model.base", f"{model.base} is {where}: {format_bytes(download)} are fetched first")
    ], download


def logged_in() -> bool:
    from huggingface_hub import get_token

    return bool(get_token())


def check_push(job: Job, login: hub.Login) -> Iterator[Finding]:
    """Whether the login may push to hub.repo. (A missing login is a fault of the spec, found in `runner.jobs`.)"""
    repo, owners = job.spec.hub.repo or "", login.owners
    if login.doubt:
        yield at(job.source, "warning", "hub.push", login.doubt)
    if owners and "/" in repo and repo.split("/")[0] not in owners:
        yield at(
            job.source, "error", "hub.repo",
            f"this login may not write there (found {repo!r}; it is {', '.join(sorted(owners))}); name a repository of its "
            "own",
        )  # fmt: skip


def check_wandb(job: Job) -> Iterator[Finding]:
    """Whether W&B has a login, where the spec tracks to it."""
    if "wandb" not in job.spec.track.to or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    if not (os.environ.get("WANDB_API_KEY") or _in_netrc()):
        yield at(
            job.source, "error", "track.to",
            "wandb has no login; run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline",
        )  # fmt: skip


def _in_netrc() -> bool:
    host = os.environ.get("WANDB_BASE_URL", f"https://{WANDB_HOST}").split("://")[-1].split("/")[0]
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
