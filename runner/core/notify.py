"""Notifications: a webhook or a command is called when a run or the queue ends. A failed notification ends no run.

Events: `run done`, `run failed`, `run stopped`, `queue done`. A webhook gets JSON by POST: {"event", "run", "text"}
(`text` is what chat services show). A command gets the same in FLUXRUN_EVENT, FLUXRUN_RUN and FLUXRUN_TEXT.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

TIMEOUT = 20.0  # seconds for the webhook to answer, or the command to end


@dataclass(frozen=True)
class Target:
    """Whom to notify, as in the spec. url: `$NAME` in it is a variable of the environment, since webhook addresses are
    secret."""

    url: str | None
    command: str | None


def send(target: Target, event: str, run: str, text: str, on_error: Callable[[str], None]) -> None:
    """Send one event. on_error: called with a message for each failure, which does not show the url."""
    if target.url is not None:
        try:
            _post(os.path.expandvars(target.url), {"event": event, "run": run, "text": text})
        except (OSError, ValueError) as error:
            on_error(f"notify.url: {event} could not be sent ({type(error).__name__})")
    if target.command is not None:
        variables = {"FLUXRUN_EVENT": event, "FLUXRUN_RUN": run, "FLUXRUN_TEXT": text}
        try:
            subprocess.run(
                shlex.split(target.command), env={**os.environ, **variables}, timeout=TIMEOUT, check=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            on_error(f"notify.command: {event} could not be sent ({error})")


def target_faults(target: Target, allow_commands: bool) -> Iterator[tuple[str, str]]:
    """(key, message) of what must be fixed before the queue starts.

    allow_commands: the user's consent, since a spec may come from anywhere and its command would run here.
    """
    if target.command is not None and not allow_commands:
        yield (
            "notify.command",
            f"this spec asks for a command (found {without_secrets(target.command)!r}); add --allow-commands, or take it out",
        )
    missing = [name for name in _variables(target.url or "") if name not in os.environ]
    if missing:
        names = ", ".join(f"${name}" for name in missing)
        yield "notify.url", f"the environment has no such variable (found {names}); set it, or take the key out"
    elif target.url is not None and not _can_be_posted_to(os.path.expandvars(target.url)):
        yield "notify.url", f"expected an address beginning with http:// or https://, got {_shown(target.url)}"


def literal_secrets(target: Target) -> Iterator[tuple[str, str]]:
    """(key, message) of secret addresses that are written out in the spec. No part of them is shown."""
    for key, text in (("notify.url", target.url), ("notify.command", target.command)):
        if text and any(map(_is_secret, _URL.findall(text))):
            way = 'put it into the environment and write url = "$NAME"'
            if key == "notify.command":
                way = "let the command read it from the environment or a file"
            yield (
                key,
                "anyone who has this address can use it, and it is written in the spec, which is copied into the run's folder "
                f"(not shown); {way}",
            )


_URL = re.compile(r"[a-z]+://[^\s\"'<>|;]+", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)  # as `os.path.expandvars` reads them
_SECRET_PARAMETER = re.compile(r"token|secret|key|sig|signature|password|auth", re.IGNORECASE)  # names of query values

# Webhooks that need no other login, from the services' own pages: (end of the host, start of the path).
# ntfy.sh: "the topic is essentially a password" (docs.ntfy.sh/publish).
WEBHOOKS = (
    ("discord.com", "/api/webhooks/"), ("discordapp.com", "/api/webhooks/"), ("hooks.slack.com", "/"),
    ("webhook.office.com", "/"), ("outlook.office.com", "/webhook/"), ("logic.azure.com", "/"),
    ("api.telegram.org", "/bot"), ("chat.googleapis.com", "/"), ("ntfy.sh", "/"), ("hooks.zapier.com", "/"),
    ("maker.ifttt.com", "/"), ("open.feishu.cn", "/open-apis/bot/"), ("webhook.site", "/"), ("hc-ping.com", "/"),
)  # fmt: skip


def _is_secret(url: str) -> bool:
    """Whether the address, without its `$NAME`s, is enough to use it."""
    try:
        parts = urlsplit(_VARIABLE.sub("", url))
        host, path = (parts.hostname or "").lower(), parts.path
    except ValueError:  # no valid address; `target_faults` reports it
        return False
    if parts.username or parts.password:
        return True
    if any(value and _SECRET_PARAMETER.search(name) for name, value in parse_qsl(parts.query)):
        return True
    return any(
        (host == end or host.endswith(f".{end}")) and path.startswith(start) and path[len(start) :].strip("/")
        for end, start in WEBHOOKS
    )


def without_secrets(text: str) -> str:
    """A url or command with its secret addresses replaced."""
    return _URL.sub(lambda match: "(an address)" if _is_secret(match[0]) else match[0], text)


def _can_be_posted_to(url: str) -> bool:
    """Whether the url is an http address with a host, a numeric port if any, and no spaces. url: without `$NAME`s."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError:
        return False
    return url.startswith(("https://", "http://")) and bool(parts.hostname) and not re.search(r"[\s\x00-\x1f\x7f]", url)


def _shown(url: str) -> str:
    """An invalid address for a message, without what may be a secret. A missing http:// makes a secret no less
    secret."""
    try:
        urlsplit(_VARIABLE.sub("", url))
    except ValueError:  # cannot be parsed, so it may be a secret
        return "one that cannot be read (not shown)"
    if _is_secret(url) or _is_secret(f"https://{url}"):
        return "another (not shown)"
    return repr(url)


def _variables(url: str) -> list[str]:
    return [plain or braced for plain, braced in _VARIABLE.findall(url)]


def _post(url: str, value: dict[str, str]) -> None:
    if not _can_be_posted_to(url):
        raise ValueError("no http address")
    import urllib.request  # half of this module's import time, and only needed to send

    request = urllib.request.Request(
        url, json.dumps(value).encode(), {"Content-Type": "application/json", "User-Agent": "fluxrun"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        response.read(1)
