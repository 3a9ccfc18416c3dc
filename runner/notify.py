"""Tells somebody elsewhere how the night goes: a webhook or a command per event. Never worth a run. No torch.

Events: `run done`, `run failed`, `run stopped`, `queue done`. A webhook gets JSON by POST: {"event", "run", "text"}
(`text` is what chat services show); a command gets the same in FLUXRUN_EVENT, FLUXRUN_RUN and FLUXRUN_TEXT.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

SECONDS = 20.0  # for the other side to answer


@dataclass(frozen=True)
class Target:
    """url and command as the spec has them: `$NAME` in a url is the environment's, since a webhook's address is a secret."""

    url: str | None
    command: str | None


def tell(target: Target, event: str, run: str, text: str, complain: Callable[[str], None]) -> None:
    """`complain` hears what went wrong, without the url."""
    if target.url is not None:
        try:
            _post(os.path.expandvars(target.url), {"event": event, "run": run, "text": text})
        except (OSError, ValueError) as error:
            complain(f"notify.url: {event} could not be told ({type(error).__name__})")
    if target.command is not None:
        told = {"FLUXRUN_EVENT": event, "FLUXRUN_RUN": run, "FLUXRUN_TEXT": text}
        try:
            subprocess.run(
                shlex.split(target.command), env={**os.environ, **told}, timeout=SECONDS, check=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            complain(f"notify.command: {event} could not be told ({error})")


def refusal(target: Target, allow_commands: bool) -> str | None:
    """What must be mended before the night, as `KEY: ...`. A spec may come from anywhere, so it alone runs no command."""
    if target.command is not None and not allow_commands:
        return f"notify.command: this spec asks for a command (found {target.command!r}); add --allow-commands, or take it out"
    left = os.path.expandvars(target.url or "")
    if "$" in left:
        return f"notify.url: the environment has no such variable (found {left!r}); set it, or take the key out"
    return None


def _post(url: str, value: dict[str, str]) -> None:
    if not url.startswith(("https://", "http://")):
        raise ValueError("no http address")
    request = urllib.request.Request(
        url, json.dumps(value).encode(), {"Content-Type": "application/json", "User-Agent": "fluxrun"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        answer.read(1)
