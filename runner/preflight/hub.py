"""What only the hub and W&B can tell: whether a base may be fetched, whether a push has a login. No torch."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from runner.base.files import PARTS
from runner.core import hub
from runner.core.humanize import format_bytes
from runner.jobs.job import Job
from runner.preflight.finding import Finding, at

WANTED = ("model_index.json", *(f"{part}/*" for part in PARTS))  # as `flux.open_base` fetches them
WANDB_HOST = "api.wandb.ai"


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def check_access(seen: Job, folder: Path | None) -> tuple[list[Finding], int]:
    """(findings, bytes to fetch) of a base that is not on this disk whole. `folder`: as far as it is there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    own = seen.spec.model
    there = "only partly on this disk" if folder else "not on this disk"

    def said(level: Any, message: str, key: str = "model.base") -> tuple[list[Finding], int]:
        return [at(seen.source, level, key, message)], 0

    if hub.offline():
        return said(
            "error",
            f"{own.base} is {there}, and HF_HUB_OFFLINE forbids fetching it; take that variable away, or name a folder",
        )
    hub.set_up_client(hub.ANSWER_TIMEOUT)
    api = HfApi()
    try:
        api.auth_check(own.base)
        info = api.model_info(own.base, revision=own.revision, files_metadata=True, timeout=hub.ANSWER_TIMEOUT)
    except GatedRepoError:
        way = (
            "and accept its licence" if logged_in() else "accept its licence, and log in (`hf auth login` or HF_TOKEN)"
        )
        return said(
            "error", f"{own.base} is gated, and this login may not read it; open {api.endpoint}/{own.base}, {way}"
        )
    except RevisionNotFoundError:
        return said(
            "error",
            f"{own.base} has no such revision (found {own.revision!r}); name a branch, tag or commit of it",
            "model.revision",
        )
    except RepositoryNotFoundError:
        return said(
            "error",
            f"the hub has no model of this name, or this login may not see it (found {own.base!r}); mend the name, or log "
            "in (`hf auth login`)",
        )
    except Exception as error:
        # Whatever else the client raises, and it has many ways to, is no verdict on the base.
        return said(
            "warning",
            f"{own.base} is {there}, and whether it can be fetched is unknown: the hub does not answer ({hub.describe_error(error)}); "
            "the run fails if it cannot, and the others go on",
        )
    bytes_ = sum(one.size or 0 for one in info.siblings or () if any(fnmatch(one.rfilename, mark) for mark in WANTED))
    if folder:
        bytes_ = max(0, bytes_ - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    return [
        at(seen.source, "note", "model.base", f"{own.base} is {there}: {format_bytes(bytes_)} are fetched first")
    ], bytes_


def logged_in() -> bool:
    from huggingface_hub import get_token

    return bool(get_token())


def check_push(seen: Job, login: hub.Login) -> Iterator[Finding]:
    """A login that is certainly wrong is told with the spec's faults (`runner.jobs.prepare`)."""
    repo, names = seen.spec.hub.repo or "", login.owners
    if login.doubt:
        yield at(seen.source, "warning", "hub.push", login.doubt)
    if names and "/" in repo and repo.split("/")[0] not in names:
        yield at(
            seen.source, "error", "hub.repo",
            f"this login may not write there (found {repo!r}; it is {', '.join(sorted(names))}); name a repository of its "
            "own",
        )  # fmt: skip


def check_wandb(seen: Job) -> Iterator[Finding]:
    if "wandb" not in seen.spec.track.to or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    if not (os.environ.get("WANDB_API_KEY") or _in_netrc()):
        yield at(
            seen.source, "error", "track.to",
            "wandb has no login; run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline",
        )  # fmt: skip


def _in_netrc() -> bool:
    host = os.environ.get("WANDB_BASE_URL", f"https://{WANDB_HOST}").split("://")[-1].split("/")[0]
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
