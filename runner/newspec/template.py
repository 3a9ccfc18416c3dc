"""`fluxrun new`: commented specs, made from the models of the spec, so that they always have every key."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from runner.newspec.template_tables import (
    ALTERNATIVES,
    EXAMPLES,
    INSTEAD,
    MEANINGS,
    NO_LORA,
    TEMPLATES,
    TemplateTable,
    Values,
)
from runner.spec import schema
from runner.spec.toml_text import toml_line

SCHEMA = "fluxrun.schema.json"
COMMENT_COLUMN, WIDTH = 46, 120  # where the meaning of a key begins, and where its lines end
NEEDED = "[needed]"
SCHEMA_LINE = f"#:schema ./{SCHEMA}\n"
HEAD = """\
# A fluxrun spec: {what}.
# `{plan}` checks it and shows what would happen, `{queue}` runs it.
#
# Lines that begin with a # show a default, or an example: remove the # to change it. Where the heading of the table
# begins with a # too, remove that one as well, and those of the lines marked {needed}.
"""
SHORT_HEAD = """\
# A fluxrun spec: {what}.
# `{plan}` checks it and shows what would happen, `{queue}` runs it.
#
# These are the keys that are changed most often; the others have their defaults. Without --short all are shown.
"""


class NewError(Exception):
    """An option of `fluxrun new` cannot be followed; the message says why."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


def new_spec(template: str, values: Values, *, short: bool, plan: str, queue: str) -> str:
    """TOML text.

    values: by dotted key, laid over the template's own; None leaves a key to its default. plan, queue: the commands
    that the heading shows.
    """
    chosen = TEMPLATES[template]
    written = {key: value for key, value in {**chosen.written, **values}.items() if value is not None}
    shown = {**EXAMPLES, "validate.size": written.get("data.resolution", 512), **chosen.shown}
    head = SCHEMA_LINE + (SHORT_HEAD if short else HEAD).format(what=chosen.what, needed=NEEDED, plan=plan, queue=queue)
    if short:
        keys = {*chosen.short, *written} - {key for key, value in values.items() if value is None}
        tables = [_top(written, short=True)]
        tables += [_short_table(table, keys, written, shown) for table in chosen.tables if not table.off]
    else:
        tables = [_top(written), *(_table(table, written, shown) for table in chosen.tables), _sweep(chosen.sweep)]
    return head + "".join(f"\n{table}" for table in tables if table)


def _top(written: Values, *, short: bool = False) -> str:
    """The keys above all tables."""
    fields = schema.Spec.model_fields
    meanings = {key: fields[key].description or "" for key in ("name", "seed")} | {"extends": MEANINGS["extends"]}
    return "".join(
        _line("" if key in written else "# ", key, written.get(key, EXAMPLES.get(key, 0)), meaning)
        for key, meaning in meanings.items()
        if key in written or not short
    )


def _table(table: TemplateTable, written: Values, shown: Values) -> str:
    heading = f"# {table.heading}\n" if table.off else f"{table.heading}\n"
    return "".join([f"# {table.note}\n" if table.note else "", heading, *_lines(table, written, shown)])


def _lines(table: TemplateTable, written: Values, shown: Values) -> Iterator[str]:
    instead = {f"{key.partition('.')[0]}.{name}" for key, (_, others) in INSTEAD.items() for name in others}
    names = ["until"] if table is NO_LORA else list(table.model.model_fields)
    for name in sorted(names, key=lambda name: name not in table.chosen):  # what the table needs comes first
        key, meaning = f"{table.path}.{name}", _meaning(table, name)
        if key in ALTERNATIVES:
            yield f"# {meaning}:\n"
            yield from (_line("# ", name, value, "") for value in ALTERNATIVES[key])
        elif name in table.chosen:
            yield _line("# ", name, table.chosen[name], f"{NEEDED} {meaning}".strip())
        elif key in written and not table.off:
            yield _line("", name, written[key], meaning)
        elif key in INSTEAD or key not in instead:
            yield _line("# ", name, _shown_default(table, name, shown), meaning)
        if key in INSTEAD:
            when, others = INSTEAD[key]
            yield f"# Instead of {name}, {when}: {', '.join(toml_line(*other) for other in others.items())}\n"


def _short_table(table: TemplateTable, keys: set[str], written: Values, shown: Values) -> str:
    lines = [
        _line("", name, written.get(key, _shown_default(table, name, shown)), _meaning(table, name))
        for name in table.model.model_fields
        if (key := f"{table.path}.{name}") in keys
    ]
    return "".join([f"{table.heading}\n", *lines]) if lines else ""


def _sweep(example: Values) -> str:
    heading = "# Several runs from this one spec: one for each combination of the values listed.\n[sweep]\n"
    return heading + "".join(_line("# ", key, values, "") for key, values in example.items())


def _line(mark: str, name: str, value: Any, meaning: str) -> str:
    """`key = value  # meaning`; a meaning that is too long for the line goes on below. mark: "# " for a commented
    line."""
    assignment = f"{mark}{toml_line(name, value)}"
    if not meaning:
        return f"{assignment}\n"
    assignment = f"{assignment:<{COMMENT_COLUMN - 2}}  "
    indent = " " * (len(assignment) - COMMENT_COLUMN)
    first, *more = textwrap.wrap(meaning, WIDTH - 2 - COMMENT_COLUMN, initial_indent=indent)
    return f"{assignment}# {first.strip()}\n" + "".join(f"{' ' * COMMENT_COLUMN}# {line}\n" for line in more)


def _meaning(table: TemplateTable, name: str) -> str:
    """What a key means, and its choices where they are few and not named yet."""
    key = f"{table.path}.{name}"
    if key in MEANINGS:
        return MEANINGS[key]
    meaning = table.model.model_fields[name].description or ""
    choices = [word for word in _choices(table.model.model_fields[name].annotation) if not word.startswith("_")]
    if len(choices) < 2 or all(word in meaning for word in choices):
        return meaning
    return f"{meaning} ({', '.join(choices)})"


def _choices(annotation: Any) -> list[str]:
    """The words that a key may be."""
    if get_origin(annotation) is Literal:
        return [word for word in get_args(annotation) if isinstance(word, str)]
    return [word for inner in get_args(annotation) for word in _choices(inner)]


def _shown_default(table: TemplateTable, name: str, shown: Values) -> Any:
    """The value of a commented line."""
    value = shown.get(f"{table.path}.{name}", table.model.model_fields[name].get_default())
    return list(value) if isinstance(value, tuple) else value
