"""A command line of train_dreambooth_lora_flux_advanced.py, taken apart: the launcher's words, the script, its
flags."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from runner.newspec.diffusers_flags import KNOWN_FLAGS, SWITCHES


class CommandError(Exception):
    """The command line cannot be read; the message says why."""


@dataclass(frozen=True)
class ScriptCommand:
    """launcher: the words before the script; flags: by name, without --; "True" for a switch."""

    launcher: list[str]
    script: str
    flags: dict[str, str]


def parse_command(command: str, environment: Mapping[str, str]) -> ScriptCommand:
    """Raises CommandError, which names all unknown flags at once."""
    words = _shell_words(command, environment)
    at = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        raise CommandError("no script in the command (a word that ends in .py)")
    if "flux" not in words[at]:
        raise CommandError(f"expected train_dreambooth_lora_flux_advanced.py, got {words[at]}")
    flags: dict[str, str] = {}
    rest, index = words[at + 1 :], 0
    while index < len(rest):
        if not rest[index].startswith("--"):
            raise CommandError(f"expected a flag, got {rest[index]!r}")
        name, equals, value = rest[index].removeprefix("--").partition("=")
        index += 1
        if name in SWITCHES:
            value = "True"
        elif not equals and index < len(rest) and not rest[index].startswith("--"):
            value, index = rest[index], index + 1
        flags[name] = value
    if unknown := [f"--{name}{_did_you_mean(name)}" for name in flags if name not in KNOWN_FLAGS]:
        raise CommandError(f"expected flags of the script, got {', '.join(unknown)}")
    return ScriptCommand(words[:at], words[at], flags)


def _shell_words(command: str, environment: Mapping[str, str]) -> list[str]:
    """With the values of variables: those of `export NAME=...` lines in the text itself, else of the environment."""
    joined = re.sub(r"\\\r?\n", " ", command)
    variables = dict(environment)
    lines = []
    for line in joined.splitlines():
        assignment = re.fullmatch(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)", line)
        if assignment:
            variables[assignment[1]] = "".join(shlex.split(assignment[2]))
        elif line.strip() and not line.strip().startswith("#"):
            lines.append(line)
    missing: list[str] = []

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables:
            missing.append(name)
        return variables.get(name, "")

    text = re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, "\n".join(lines))
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        raise CommandError(
            f"variables without a value: {names}; put `export NAME=...` lines before the command, or set them"
        )
    try:
        return shlex.split(text)
    except ValueError as error:
        raise CommandError(f"not a shell command ({error})") from error


def _did_you_mean(name: str) -> str:
    near = difflib.get_close_matches(name, sorted(KNOWN_FLAGS), 1)
    return f" (did you mean --{near[0]}?)" if near else ""
