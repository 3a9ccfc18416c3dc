"""The text that `fluxrun new` writes: a template, or a translated command line, with what --pictures and --card add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from runner.core.command_line import fluxrun_command
from runner.core.errors import SpecError
from runner.core.humanize import format_bytes
from runner.jobs.prepare import draft_spec
from runner.newspec.card import card_bytes, fitting_values
from runner.newspec.from_diffusers import draft_text, read_command
from runner.newspec.pictures import FolderFindings, inspect_folder
from runner.newspec.shell_command import CommandError
from runner.newspec.template import SCHEMA_LINE, NewError, new_spec
from runner.newspec.template_tables import TEMPLATES, Values
from runner.plan.faults import PlanError
from runner.spec.run_names import to_run_name
from runner.spec.toml_text import toml_value


@dataclass(frozen=True)
class NewSpecRequest:
    """The command's options. file: where the spec will be; command: the text of --from-command."""

    file: Path
    template: str = "pivotal"
    command: str | None = None
    short: bool = False
    card: str | None = None
    pictures: Path | None = None


@dataclass(frozen=True)
class NewSpec:
    """text: of the whole file, which `fluxrun plan` accepts; notes: what was found and set, a line each."""

    text: str
    notes: tuple[str, ...]


def write_new_spec(request: NewSpecRequest) -> NewSpec:
    """The text is only returned. Raises NewError."""
    if request.command is not None:
        return _fitted(request, _command_text(request.command), None, "--from-command")
    findings = None
    if request.pictures is not None:
        findings = inspect_folder(request.pictures, request.file, TEMPLATES[request.template].written)
    return _fitted(request, _template_text(request, findings), findings, "FILE")


def _fitted(
    request: NewSpecRequest, text_with: Callable[[Values], str], findings: FolderFindings | None, option: str
) -> NewSpec:
    """With the settings that --card asks for. option: the one to blame if fluxrun would refuse the spec."""
    pictures = findings.pictures if findings else None
    notes = [findings.summary] if findings else []
    values: Values = {}
    try:
        draft_spec(text_with({}), request.file)
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


def _template_text(request: NewSpecRequest, findings: FolderFindings | None) -> Callable[[Values], str]:
    """The text with given values, which are laid over the folder's."""
    name = to_run_name(request.file.stem)
    fixed = {**({} if name == request.file.stem else {"name": name}), **(findings.values if findings else {})}
    plan, queue = fluxrun_command("plan", request.file), fluxrun_command("queue", request.file)
    return lambda values: new_spec(request.template, {**fixed, **values}, short=request.short, plan=plan, queue=queue)


def _command_text(command: str) -> Callable[[Values], str]:
    try:
        draft = read_command(command)
    except CommandError as error:
        raise NewError("--from-command", str(error)) from None
    return lambda values: SCHEMA_LINE + draft_text(replace(draft, values={**draft.values, **values}))
