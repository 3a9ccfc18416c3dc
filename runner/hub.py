"""The hub: whether this machine may push there, asked before the night, and the push itself. No torch.

The login is the hub's own (HF_TOKEN, `hf auth login`); no token is kept, written or shown here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

PAUSES = (5.0, 30.0, 120.0)  # seconds before another try: a hub that answers 503 needs its minute
LOGIN = "set HF_TOKEN, or `hf auth login`, to a token that may write"


def login_fault() -> str | None:
    """Why a push would be refused, and what to do; None where it would not be."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        return f"hub.push is true, and this machine has no login for the hub; {LOGIN}, or take hub.push out"
    try:
        told = HfApi().whoami()
    except Exception as error:
        # The client has a different exception for each way of not being answered; all mean the same here.
        if (
            isinstance(error, HfHubHTTPError)
            and error.response is not None
            and error.response.status_code in (401, 403)
        ):
            return f"the hub refuses this machine's token; {LOGIN}, or take hub.push out"
        return (
            f"the hub cannot be asked whether the login is good ({_told(error)}); connect, or take hub.push out and "
            "`fluxrun export RUN --push` when the run is done"
        )
    if told.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return f"the hub's login may only read; {LOGIN}, or take hub.push out"
    return None


def push(folder: Path, repo: str, private: bool, message: str, stop_requested: Callable[[], bool]) -> str | None:
    """Upload a folder as it is, trying again for some minutes. Returns what went wrong: it ends no run."""
    from huggingface_hub import HfApi

    wrong = "stopped before the first try"
    for pause in (0.0, *PAUSES):
        if not _wait(pause, stop_requested):
            break
        try:
            api = HfApi()
            made = api.create_repo(repo, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=made, folder_path=folder, commit_message=message)
        except Exception as error:
            # What was trained is safe and whatever the hub or the network does cannot be worth the run.
            wrong = _told(error)
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


def _told(error: Exception) -> str:
    """An error in one line, without a token that its text may have picked up."""
    from huggingface_hub import get_token

    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text.replace(get_token() or "\0", "(token)")
