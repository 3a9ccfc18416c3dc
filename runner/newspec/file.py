"""What `fluxrun new` writes: a template, or a command line of diffusers' script, with what --pictures and --card add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from runner.core.command_line import fluxrun_command as typed
from runner.core.errors import SpecError
from runner.core.humanize import format_bytes
from runner.data.images import Pictures
from runner.jobs.prepare import draft_spec
from runner.newspec.card import card_bytes, fitting_values
from runner.newspec.from_diffusers import draft_text, read_command
from runner.newspec.pictures import FolderFindings, inspect_folder
from runner.newspec.shell_command import CommandError
from runner.newspec.template import FIRST, TEMPLATES, NewError, Values, new_spec
from runner.plan.faults import PlanError
from runner.spec.run_names import to_run_name
from runner.spec.toml_text import toml_value


@dataclass(frozen=True)
class NewSpecRequest:
    """The options, as typed. file: where the spec is to stand; command: the text of --from-command."""

    file: Path
    template: str = "pivotal"
    command: str | None = None
    short: bool = False
    card: str | None = None
    pictures: Path | None = None


@dataclass(frozen=True)
class NewSpec:
    """text: of the whole file, which `fluxrun plan` takes; notes: what was found and set, a line each."""

    text: str
    notes: tuple[str, ...]


def write_new_spec(request: NewSpecRequest) -> NewSpec:
    """Raises NewError."""
    if request.command is not None:
        return _fitted(request, _command_text(request), None, "--from-command")
    found = None
    if request.pictures is not None:
        found = inspect_folder(request.pictures, request.file, TEMPLATES[request.template].values)
    return _fitted(request, _template_text(request, found), found, "FILE")


def _fitted(
    request: NewSpecRequest, text_with: Callable[[Values], str], found: FolderFindings | None, option: str
) -> NewSpec:
    """With the settings that --card asks for. option: whose fault a spec is that fluxrun would refuse."""
    pictures: Pictures | None = found.pictures if found else None
    notes = [found.summary] if found else []
    try:
        draft_spec(text_with({}), request.file)
        values: Values = {}
        if request.card is not None:
            card = card_bytes(request.card)
            values = fitting_values(text_with, request.file, pictures, card)
            chosen = ", ".join(f"{key} = {toml_value(value)}" for key, value in values.items())
            notes.append(f"fits a card of {format_bytes(card)} {f'with {chosen}' if chosen else 'as it is'}")
    except SpecError as error:
        faults = "; ".join(f"{fault.key}: {fault.message}" for fault in error.faults)
        raise NewError(option, f"fluxrun would refuse that spec: {faults}") from error
    except PlanError as error:
        raise NewError(option, f"fluxrun would refuse that spec: {error}") from error
    return NewSpec(text_with(values), tuple(notes))


def _template_text(request: NewSpecRequest, found: FolderFindings | None) -> Callable[[Values], str]:
    name = to_run_name(request.file.stem)
    found_values = {**({} if name == request.file.stem else {"name": name}), **(found.values if found else {})}
    plan, queue = typed("plan", request.file), typed("queue", request.file)
    return lambda values: new_spec(
        request.template, {**found_values, **values}, short=request.short, plan=plan, queue=queue
    )


def _command_text(request: NewSpecRequest) -> Callable[[Values], str]:
    assert request.command is not None
    try:
        draft = read_command(request.command)
    except CommandError as error:
        raise NewError("--from-command", str(error)) from None
    return lambda values: FIRST + draft_text(replace(draft, values={**draft.values, **values}))
