"""The Hugging Face Hub: valid repository names, its errors, the login, and the upload.

The login is huggingface_hub's own (HF_TOKEN, `hf auth login`). No token is stored, written or shown here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

from runner.core.hashing import content_key

RETRY_DELAYS = (5.0, 30.0, 120.0)  # seconds before another try; a hub that answers 503 may need a minute
LOGIN_HINT = "set HF_TOKEN, or `hf auth login`, to a token that may write"
ANSWER_TIMEOUT = 10.0  # seconds for one answer
UPLOAD_TIMEOUT = 120.0  # seconds in which an upload moves no byte
MAX_NAME = 96  # characters of a repository's name, as `huggingface_hub.utils.validate_repo_id` has it

# Names that are certainly valid, so that `plan` need not import the client to ask it.
_WORDS = r"(?=.{1,96}(?:/|$))\w+(?:[.-]\w+)*"
PLAIN_ID = re.compile(rf"(?!.*\.git$)(?:{_WORDS}/)?{_WORDS}", re.ASCII)

MAX_DESCRIPTION = 300  # characters of an error

# Status codes below 500 that may change on another try (RFC 9110, RFC 6585); 412: the branch moved meanwhile.
TRANSIENT_STATUS = {408, 412, 425, 429}
# Packages that the hub's client sends requests with; their errors are network errors.
TRANSPORTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"}


# ---- names ---------------------------------------------------------------------------------------------------------


def repository_id_fault(repo: str) -> str | None:
    """What is wrong with a repository's name, by the rule of the hub's client; None where it is valid."""
    if PLAIN_ID.fullmatch(repo):
        return None
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return (
            f"the hub takes no such name (found {repo!r}); allowed are NAME and OWNER/NAME of letters, digits, -, _ and ., at "
            f"most {MAX_NAME} characters each, no -- and no .., no - or . at either end, no .git at the end; did you mean "
            f"{'/'.join(map(repository_name, repo.rsplit('/', 1)))!r}?"
        )
    return None


def repository_name(text: str) -> str:
    """The valid repository name that is closest to `text`."""
    name = re.sub(r"\.\.+", ".", re.sub(r"-+", "-", re.sub(r"[^A-Za-z0-9._-]", "-", text)))
    name = re.sub(r"(\.git)+$", "", name[:MAX_NAME].strip("-."))
    return re.sub(r"-+", "-", name).strip("-.") or "lora"


def repository(asked: str | None, run: str) -> str:
    """The repository that a run is pushed to; one without an owner belongs to the login.

    asked: hub.repo. Without it, the run's own name where it is valid, else the closest valid name with a digest of the
    run's name, so that no two runs share a repository.
    """
    if asked is not None:
        return asked
    plain = run.replace("/", "-")
    if repository_name(plain) == plain:
        return plain
    digest = content_key("repository", run)[:8]
    return f"{repository_name(plain)[: MAX_NAME - len(digest) - 1].strip('-.')}-{digest}"


# ---- the client's errors ---------------------------------------------------------------------------------------------


def is_transient(error: BaseException) -> bool:
    """Whether another try may succeed: there is no network, or the hub is down, slow or answers garbage.

    What the hub has decided (no such repository, no access, an invalid name) is final.
    """
    return _find_cause(error)[1]


def describe_error(error: BaseException) -> str:
    """An error in one line, without the login's token."""
    from huggingface_hub import get_token

    cause, _ = _find_cause(error)
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    text = text.replace(get_token() or "\0", "(token)")
    return text if len(text) <= MAX_DESCRIPTION else f"{text[: MAX_DESCRIPTION - 3]}..."


def _find_cause(error: BaseException) -> tuple[BaseException, bool]:
    """(the exception in the chain of causes that says what happened, whether it is transient)."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OfflineModeIsEnabled | LocalTokenNotFoundError):
            return cause, False
        if (status := _status(cause)) is not None:
            return cause, status >= 500 or status in TRANSIENT_STATUS
        from_transport = type(cause).__module__.split(".", maxsplit=1)[0] in TRANSPORTS
        if from_transport or isinstance(cause, ConnectionError | TimeoutError | JSONDecodeError):
            return cause, True
        cause = cause.__cause__ or cause.__context__
    return error, False


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error that the hub answered with."""
    from huggingface_hub.errors import HfHubHTTPError

    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) else None


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests to the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def set_up_client(seconds: float) -> None:
    """Limit the client's wait for one answer, which has no limit by default, and silence its line per try."""
    from huggingface_hub.utils import get_session, logging

    get_session().timeout = seconds
    logging.set_verbosity_error()


# ---- the login -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Login:
    """The hub's login of this machine.

    name: the user's. owners: users and organisations whose repositories it may write; empty where that is not known.
    fault: why a push would be refused, and what to do. doubt: why it is unknown whether a push would be refused.
    """

    name: str = ""
    owners: frozenset[str] = frozenset()
    fault: str | None = None
    doubt: str | None = None


def login() -> Login:
    """Ask the hub whose token this machine has, and what it may do."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        return Login(
            fault=f"hub.push is true, and this machine has no login for the hub; {LOGIN_HINT}, or take hub.push out"
        )
    try:
        set_up_client(ANSWER_TIMEOUT)
        user = HfApi().whoami()
        owners = frozenset(str(account["name"]) for account in (user, *user.get("orgs", ())) if account.get("name"))
        role = user.get("auth", {}).get("accessToken", {}).get("role")
    except Exception as error:
        # The client has many exceptions for a missing answer, and fails in other ways on an answer of unexpected form.
        if _status(error) in (401, 403):
            return Login(fault=f"the hub refuses this machine's token; {LOGIN_HINT}, or take hub.push out")
        return Login(
            doubt=f"whether the login is good is unknown: the hub does not answer ({describe_error(error)}); where the push fails, "
            "`fluxrun export RUN --push` tries again"
        )
    if role == "read":
        return Login(fault=f"the hub's login may only read; {LOGIN_HINT}, or take hub.push out")
    return Login(str(user.get("name", "")), owners)


# ---- the push ------------------------------------------------------------------------------------------------------


def push(folder: Path, repo: str, private: bool, message: str, stop_requested: Callable[[], bool]) -> str | None:
    """Upload a folder, with some minutes of further tries after transient errors.

    Returns what went wrong, or None: a failed push ends no run.
    """
    from huggingface_hub import HfApi

    if fault := repository_id_fault(repo):
        return fault
    fault = "stopped before the first try"
    for delay in (0.0, *RETRY_DELAYS):
        if not _wait(delay, stop_requested):
            break
        try:
            set_up_client(UPLOAD_TIMEOUT)
            api = HfApi()
            repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        except Exception as error:
            # Whatever the hub or the network does, the trained files are safe on this machine.
            fault = describe_error(error)
            if not is_transient(error):
                break
        else:
            return None
    return fault


def _wait(seconds: float, stop_requested: Callable[[], bool]) -> bool:
    """Wait. False where a stop was requested meanwhile."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if stop_requested():
            return False
        time.sleep(min(0.5, seconds))
    return not stop_requested()
