"""The hub: names that it takes, the login, whether it answers, and the push itself. No torch.

The login is the hub's own (HF_TOKEN, `hf auth login`); no token is kept, written or shown here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

from runner.core.hashing import content_key

PAUSES = (5.0, 30.0, 120.0)  # seconds before another try: a hub that answers 503 needs its minute
LOGIN = "set HF_TOKEN, or `hf auth login`, to a token that may write"
ANSWER = 10.0  # seconds for one answer to a question
UPLOAD = 120.0  # seconds without a byte moving in an upload
LONGEST_ID = 96  # characters of a repository's name, as `huggingface_hub.utils.validate_repo_id` has it

# A name that the client's rule takes for certain: `plan` need not import the client to know that.
_WORDS = r"(?=.{1,96}(?:/|$))\w+(?:[.-]\w+)*"
PLAIN_ID = re.compile(rf"(?!.*\.git$)(?:{_WORDS}/)?{_WORDS}", re.ASCII)

LONGEST_DESCRIPTION = 300  # characters of an error

# Answers below 500 that may be another one the next time: RFC 9110 and RFC 6585; 412: the branch moved meanwhile.
TRANSIENT_STATUS = {408, 412, 425, 429}
TRANSPORTS = {
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "requests",
    "urllib3",
    "aiohttp",
}  # packages below the hub's client


# ---- names ---------------------------------------------------------------------------------------------------------


def repository_id_fault(repo: str) -> str | None:
    """Why the hub takes no repository of this name, by its own client's rule; None where it does."""
    if PLAIN_ID.fullmatch(repo):
        return None
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return (
            f"the hub takes no such name (found {repo!r}); allowed are NAME and OWNER/NAME of letters, digits, -, _ and ., at "
            f"most {LONGEST_ID} characters each, no -- and no .., no - or . at either end, no .git at the end; did you mean "
            f"{'/'.join(map(repository_name, repo.rsplit('/', 1)))!r}?"
        )
    return None


def repository_name(text: str) -> str:
    """A repository's name as near to `text` as the hub takes one."""
    name = re.sub(r"\.\.+", ".", re.sub(r"-+", "-", re.sub(r"[^A-Za-z0-9._-]", "-", text)))
    name = re.sub(r"(\.git)+$", "", name[:LONGEST_ID].strip("-."))
    return re.sub(r"-+", "-", name).strip("-.") or "lora"


def repository(asked: str | None, run: str) -> str:
    """Where a run is pushed to; without an owner it is the login's own. `asked`: hub.repo. A run that names none takes its
    own name, where the hub takes that; else the nearest that it does, with a digest of the run's name, so that no two runs
    have the same."""
    if asked is not None:
        return asked
    plain = run.replace("/", "-")
    if repository_name(plain) == plain:
        return plain
    digest = content_key("repository", run)[:8]
    return f"{repository_name(plain)[: LONGEST_ID - len(digest) - 1].strip('-.')}-{digest}"


# ---- what its client raises ----------------------------------------------------------------------------------------


def is_transient(error: BaseException) -> bool:
    """Whether the same question may be answered later: no network, a hub that is down, slow, or answers garbage. What the
    hub has decided (no such repository, no access, no such name) stays so."""
    return _verdict(error)[1]


def describe_error(error: BaseException) -> str:
    """An error in one line, without a token that its text may have picked up."""
    from huggingface_hub import get_token

    cause, _ = _verdict(error)
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    text = text.replace(get_token() or "\0", "(token)")
    return text if len(text) <= LONGEST_DESCRIPTION else f"{text[: LONGEST_DESCRIPTION - 3]}..."


def _verdict(error: BaseException) -> tuple[BaseException, bool]:
    """(which of an error and its causes says what happened, whether that may pass)."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OfflineModeIsEnabled | LocalTokenNotFoundError):
            return cause, False
        if (status := _status(cause)) is not None:
            return cause, status >= 500 or status in TRANSIENT_STATUS
        below = type(cause).__module__.split(".")[0] in TRANSPORTS
        if below or isinstance(cause, ConnectionError | TimeoutError | JSONDecodeError):
            return cause, True
        cause = cause.__cause__ or cause.__context__
    return error, False


def _status(error: BaseException) -> int | None:
    """The number of the hub's answer, where it gave one that is an error."""
    from huggingface_hub.errors import HfHubHTTPError

    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) else None


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking the hub anything: what is not here then stays away."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def set_up_client(seconds: float) -> None:
    """Its patience for one answer: by itself it waits for ever, and says each try line by line."""
    from huggingface_hub.utils import get_session, logging

    get_session().timeout = seconds
    logging.set_verbosity_error()


# ---- the login -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Login:
    """name: the user's; names: whose repositories it may write; none where that is not known. fault: why a push would be refused, and what
    to do; doubt: why nobody can say whether it would be."""

    name: str = ""
    names: frozenset[str] = frozenset()
    fault: str | None = None
    doubt: str | None = None


def login() -> Login:
    """Ask the hub who this machine's token is."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        return Login(
            fault=f"hub.push is true, and this machine has no login for the hub; {LOGIN}, or take hub.push out"
        )
    try:
        set_up_client(ANSWER)
        facts = HfApi().whoami()
        names = frozenset(str(one["name"]) for one in (facts, *facts.get("orgs", ())) if one.get("name"))
        role = facts.get("auth", {}).get("accessToken", {}).get("role")
    except Exception as error:
        # The client has a different exception for each way of not being answered, and trips over answers of another form.
        if _status(error) in (401, 403):
            return Login(fault=f"the hub refuses this machine's token; {LOGIN}, or take hub.push out")
        return Login(
            doubt=f"whether the login is good is unknown: the hub does not answer ({describe_error(error)}); where the push fails, "
            "`fluxrun export RUN --push` tries again"
        )
    if role == "read":
        return Login(fault=f"the hub's login may only read; {LOGIN}, or take hub.push out")
    return Login(str(facts.get("name", "")), names)


# ---- the push ------------------------------------------------------------------------------------------------------


def push(folder: Path, repo: str, private: bool, message: str, stop_requested: Callable[[], bool]) -> str | None:
    """Upload a folder as it is, trying again for some minutes where that can help. Returns what went wrong: it ends no
    run."""
    from huggingface_hub import HfApi

    if wrong := repository_id_fault(repo):
        return wrong
    wrong = "stopped before the first try"
    for pause in (0.0, *PAUSES):
        if not _wait(pause, stop_requested):
            break
        try:
            set_up_client(UPLOAD)
            api = HfApi()
            made = api.create_repo(repo, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=made, folder_path=folder, commit_message=message)
        except Exception as error:
            # What was trained is safe and whatever the hub or the network does cannot be worth the run.
            wrong = describe_error(error)
            if not is_transient(error):
                break
        else:
            return None
    return wrong


def _wait(seconds: float, stop_requested: Callable[[], bool]) -> bool:
    """False where the wait was cut short."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if stop_requested():
            return False
        time.sleep(min(0.5, seconds))
    return not stop_requested()
