"""Tells somebody elsewhere how the night goes: a webhook or a command per event. Never worth a run. No torch.

Events: `run done`, `run failed`, `run stopped`, `queue done`. A webhook gets JSON by POST: {"event", "run", "text"}
(`text` is what chat services show); a command gets the same in FLUXRUN_EVENT, FLUXRUN_RUN and FLUXRUN_TEXT.
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

SECONDS = 20.0  # for the other side to answer


@dataclass(frozen=True)
class Target:
    """url and command as the spec has them: `$NAME` in a url is the environment's, since a webhook's address is a secret."""

    url: str | None
    command: str | None


def send(target: Target, event: str, run: str, text: str, complain: Callable[[str], None]) -> None:
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


def target_faults(target: Target, allow_commands: bool) -> Iterator[tuple[str, str]]:
    """(key, message) of what must be mended before the night. A spec may come from anywhere, so it alone runs no command."""
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
    """(key, message) of addresses that are a secret and stand in the spec as they are; no part of them is shown."""
    for key, text in (("notify.url", target.url), ("notify.command", target.command)):
        if text and any(map(_is_secret, _URL.findall(text))):
            way = 'put it into the environment and write url = "$NAME"'
            if key == "notify.command":
                way = "let the command read it from the environment or a file"
            yield (
                key,
                "whoever knows this address can use it, and it stands in the spec, which is copied into the run's folder (not "
                f"shown); {way}",
            )


_URL = re.compile(r"[a-z]+://[^\s\"'<>|;]+", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)  # as `os.path.expandvars` reads them
_TELLING = re.compile(r"token|secret|key|sig|signature|password|auth", re.IGNORECASE)  # in names of query values

# Addresses that need nothing but themselves, as the services' own pages give them: (end of the host, start of the path).
# ntfy.sh: "the topic is essentially a password" (docs.ntfy.sh/publish).
WEBHOOKS = (
    ("discord.com", "/api/webhooks/"), ("discordapp.com", "/api/webhooks/"), ("hooks.slack.com", "/"),
    ("webhook.office.com", "/"), ("outlook.office.com", "/webhook/"), ("logic.azure.com", "/"),
    ("api.telegram.org", "/bot"), ("chat.googleapis.com", "/"), ("ntfy.sh", "/"), ("hooks.zapier.com", "/"),
    ("maker.ifttt.com", "/"), ("open.feishu.cn", "/open-apis/bot/"), ("webhook.site", "/"), ("hc-ping.com", "/"),
)  # fmt: skip


def _is_secret(url: str) -> bool:
    """Whether what is written out in it, less `$NAME`s, lets others in."""
    try:
        found = urlsplit(_VARIABLE.sub("", url))
        host, path = (found.hostname or "").lower(), found.path
    except ValueError:  # no address, which is told when it is used
        return False
    if found.username or found.password:
        return True
    if any(value and _TELLING.search(name) for name, value in parse_qsl(found.query)):
        return True
    return any(
        (host == end or host.endswith(f".{end}")) and path.startswith(start) and path[len(start) :].strip("/")
        for end, start in WEBHOOKS
    )


def without_secrets(text: str) -> str:
    """A url or command as it may be shown and passed on."""
    return _URL.sub(lambda found: "(an address)" if _is_secret(found[0]) else found[0], text)


def _can_be_posted_to(url: str) -> bool:
    """Whether it is an http address with a host, a port that is a number, and no spaces. url: without `$NAME`s."""
    try:
        found = urlsplit(url)
        found.port  # noqa: B018 - raises where it is no number
    except ValueError:
        return False
    return url.startswith(("https://", "http://")) and bool(found.hostname) and not re.search(r"[\s\x00-\x1f\x7f]", url)


def _shown(url: str) -> str:
    """An address that is at fault, as the spec has it; one that may be a secret is not shown. Without its http:// it may be
    one too."""
    try:
        urlsplit(_VARIABLE.sub("", url))
    except ValueError:  # cannot be taken apart, so nothing says that it is none
        return "one that cannot be read (not shown)"
    if _is_secret(url) or _is_secret(f"https://{url}"):
        return "another (not shown)"
    return repr(url)


def _variables(url: str) -> list[str]:
    return [plain or braced for plain, braced in _VARIABLE.findall(url)]


def _post(url: str, value: dict[str, str]) -> None:
    if not _can_be_posted_to(url):
        raise ValueError("no http address")
    import urllib.request  # half of what this module costs, and only told when there is something to tell

    request = urllib.request.Request(
        url, json.dumps(value).encode(), {"Content-Type": "application/json", "User-Agent": "fluxrun"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        answer.read(1)
