"""Whether click takes a command line."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest

from runner.cli import main


def refusal(words: list[str], folder: Path) -> str | None:
    """Why click does not take a command line; None where it does, or where only the command is named (`fluxrun
    plan`)."""
    group: click.Command = main
    context = click.Context(main, info_name="fluxrun")
    rest = list(words)
    while isinstance(group, click.Group) and rest and (found := group.get_command(context, rest[0])):
        group, rest = found, rest[1:]
    if isinstance(group, click.Group) and (rest or group is main) and not (rest and rest[0].startswith("-")):
        return f"no command {shlex.join(words)}"
    if not rest:
        return None
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "runs").mkdir(exist_ok=True)
        for name in ("FILE", "LORA.safetensors"):
            (folder / name).touch()
        try:
            group.make_context(group.name, rest)
        except click.exceptions.Exit:
            return None  # --help, --version
        except click.ClickException as error:
            return error.format_message()
    return None
