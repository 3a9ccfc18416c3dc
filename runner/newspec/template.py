"""`fluxrun new`: commented specs, made from the models of the spec, so that they always have every key."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from runner.spec import schema
from runner.spec.toml_text import toml_line

DEFAULT_BASE = "black-forest-labs/FLUX.1-dev"
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

Values = Mapping[str, Any]


class NewError(Exception):
    """An option of `fluxrun new` cannot be followed; the message says why."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True)
class TemplateTable:
    """One table of the file.

    note: a comment above it; off: the whole table is commented out; chosen: values of the keys that it needs when it is
    on.
    """

    heading: str
    model: type[BaseModel]
    note: str = ""
    off: bool = False
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.heading.strip("[]")


MODEL = TemplateTable("[model]", schema.Model)
DATA = TemplateTable("[data]", schema.Data)
TOKENS = TemplateTable("[[tokens]]", schema.Token, "New words that the text encoders learn: one such table for each.")
INVERSION = TemplateTable("[inversion]", schema.Inversion, "How the new words are learned.")
LORA = TemplateTable("[lora]", schema.Lora)
NO_LORA = TemplateTable("[lora]", schema.Lora, "No LoRA: only the words are learned.")
TEXT_LORA = TemplateTable(
    "[text_lora]", schema.TextLora, "A LoRA of the CLIP encoder, beside the transformer's.", off=True
)
TRAIN = TemplateTable("[train]", schema.Train)
ADAMW = TemplateTable(
    "[optimizer]", schema.AdamW, 'AdamW; "adamw8bit" has the same keys and needs bitsandbytes.', off=True
)
PRODIGY = TemplateTable(
    "[optimizer]", schema.Prodigy, "Or Prodigy, which finds the learning rate itself: leave train.lr out.", True,
    {"name": "prodigy"},
)  # fmt: skip
PRIOR = TemplateTable(
    "[prior]", schema.Prior, "Prior preservation: pictures of the class; the base generates those that are missing.", True,
    {"images": "class-images", "prompt": "a photo of a dog"},
)  # fmt: skip
COMMON_TABLES = (
    TemplateTable("[schedule]", schema.Schedule, "How the learning rate changes."),
    PRIOR,
    TemplateTable("[validate]", schema.Validate, "Sample pictures, and the loss on held-out pictures, in training."),
    TemplateTable("[stop]", schema.Stop, "Early stopping, by the loss that is measured every validate.every steps."),
    TemplateTable("[checkpoint]", schema.Checkpoint),
    TemplateTable("[export]", schema.Export),
    TemplateTable("[track]", schema.Track),
    TemplateTable("[hub]", schema.Hub, "Log in with `hf auth login` or HF_TOKEN: a spec must not contain secrets."),
    TemplateTable("[notify]", schema.Notify),
    TemplateTable("[compute]", schema.Compute),
)

# Values of commented lines, for keys without a default, or with one that says little.
EXAMPLES: Values = {
    "name": "my-lora", "extends": "base.toml",
    "model.revision": "main", "model.variant": "fp16", "model.dtype": "bf16",
    "data.prompt": "a photo of TOK", "data.variants": 4,
    "prior.dtype": "bf16",
    "tokens.initializer": "dog", "tokens.placeholder": "bird",
    "inversion.until": 0.5, "inversion.lr": 1e-4, "inversion.gradient_checkpointing": True,
    "lora.alpha": 16.0,
    "text_lora.alpha": 16.0, "text_lora.lr": 1e-4,
    "train.lr": 1e-4,
    "optimizer.beta3": 0.9995, "optimizer.growth_rate": 1.02,
    "checkpoint.minutes": 10.0,
    "stop.no_better_for": 500, "stop.loss_above": 2.0, "stop.at": 0.2,
    "hub.repo": "my-name/my-lora",
    "notify.url": "$SLACK_WEBHOOK", "notify.command": "notify-send fluxrun",
}  # fmt: skip
# key -> (when, keys to use instead), shown below it
INSTEAD: Mapping[str, tuple[str, Values]] = {
    "data.source": (
        "for a data set of the hub",
        {"source": "owner/data-set", "config": "default", "caption_column": "text"},
    ),
    "train.steps": ("in passes over the pictures", {"epochs": 20}),
}
ALTERNATIVES: Mapping[str, tuple[Any, ...]] = {  # values of a key, a commented line each
    "train.weighting": (
        {"scheme": "logit_normal", "mean": 0.0, "std": 1.0},
        {"scheme": "mode", "scale": 1.29},
        {"scheme": "sigma_sqrt"},
        {"scheme": "cosmap"},
    ),
}
MEANINGS = {  # instead of the models', where those do not suit a file
    "extends": "A TOML file that this one is merged over: for what several specs share",
    "model.gradient_checkpointing": 'Recompute activations in the backward pass: less memory, slower (true; "selective", only '
    "the cheapest of each block; or n, every n-th block)",
    "inversion.encoders": 'Encoders that learn token embeddings: ["clip"] or ["clip", "t5"]',
    "train.weighting": "Timesteps are drawn evenly, or by one of these",
    "track.to": 'Trackers: "tensorboard", "wandb", or none',
}


@dataclass(frozen=True)
class Template:
    """What `fluxrun new --template` writes.

    tables: in their order; written: values of the lines that are not commented out, by dotted key; short: the keys of
    --short; sweep: an example; shown: values of commented lines that differ from EXAMPLES.
    """

    what: str
    tables: tuple[TemplateTable, ...]
    written: Values
    short: tuple[str, ...]
    sweep: Values
    shown: Values = field(default_factory=dict)


BASE: Values = {"model.base": DEFAULT_BASE, "data.source": "my-pictures"}
COMMON_VALUES: Values = {"train.steps": 1000, "validate.every": 250}
MOST_CHANGED = ("model.base", "data.source", "data.prompt", "data.resolution")
TRAINING = ("train.steps", "train.batch_size", "train.lr", "validate.prompts", "validate.every")
TEMPLATES = {
    "pivotal": Template(
        "pivotal tuning, new words learned beside a LoRA",
        (MODEL, DATA, TOKENS, INVERSION, LORA, TRAIN, ADAMW, PRODIGY, *COMMON_TABLES),
        {
            **BASE, "data.prompt": "a photo of TOK", "tokens.name": "TOK",
            **COMMON_VALUES, "validate.prompts": ["a photo of TOK on a beach"],
        },
        (*MOST_CHANGED, "tokens.name", "inversion.encoders", "lora.rank", *TRAINING),
        {"lora.rank": [8, 16, 32], "train.lr": [1e-4, 4e-4]},
    ),
    "lora": Template(
        "a LoRA alone",
        (MODEL, DATA, LORA, TEXT_LORA, TRAIN, ADAMW, PRODIGY, *COMMON_TABLES),
        {
            **BASE, "data.prompt": "a photo of ohwx dog",
            **COMMON_VALUES, "validate.prompts": ["a photo of ohwx dog on a beach"],
        },
        (*MOST_CHANGED, "lora.rank", "lora.layers", *TRAINING),
        {"lora.rank": [8, 16, 32], "train.lr": [1e-4, 4e-4]},
        {"data.prompt": "a photo of ohwx dog"},
    ),
    "inversion": Template(
        "textual inversion alone, new words and no LoRA",
        (MODEL, DATA, TOKENS, INVERSION, NO_LORA, TRAIN, ADAMW, *COMMON_TABLES),
        {
            **BASE, "data.prompt": "a photo of TOK", "tokens.name": "TOK",
            "inversion.encoders": ["clip", "t5"], "lora.until": 0.0, "train.lr": 1e-3,
            **COMMON_VALUES, "validate.prompts": ["a photo of TOK on a beach"],
        },
        (*MOST_CHANGED, "tokens.name", "tokens.vectors", "inversion.encoders", "lora.until", *TRAINING),
        {"train.lr": [1e-3, 4e-3], "seed": [0, 1]},
        {"inversion.until": 1.0, "inversion.lr": 1e-3},
    ),
}  # fmt: skip


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
