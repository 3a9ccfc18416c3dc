"""`fluxrun new`: a commented spec, made from the spec's own models, so that it cannot fall behind them."""

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
COLUMN, WIDTH = 46, 120  # where what a key means begins, and where its lines end
NEEDED = "[needed]"
FIRST = f"#:schema ./{SCHEMA}\n"
HEAD = """\
# A fluxrun spec: {what}.
# `{plan}` checks it and says what would happen, `{queue}` does it.
#
# Lines that begin with a # show a default, or an example: take the # away to change it. Where the heading of the table
# begins with a # too, take that one away as well, and those of the lines marked {needed}.
"""
SHORT_HEAD = """\
# A fluxrun spec: {what}.
# `{plan}` checks it and says what would happen, `{queue}` does it.
#
# These are the keys that people change most; all others have their defaults. `fluxrun new` without --short shows them all.
"""

Values = Mapping[str, Any]


class NewError(Exception):
    """What an option of `fluxrun new` asks for cannot be done; the message says why."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True)
class Table:
    """One table of the file. off: it stands there as comments; chosen: the keys that make a commented one what it is."""

    heading: str
    model: type[BaseModel]
    note: str = ""
    off: bool = False
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.heading.strip("[]")


MODEL = Table("[model]", schema.Model)
DATA = Table("[data]", schema.Data)
TOKENS = Table("[[tokens]]", schema.Token, "New words that the text encoders learn; one such table for each.")
INVERSION = Table("[inversion]", schema.Inversion, "How the new words are learned.")
LORA = Table("[lora]", schema.Lora)
NO_LORA = Table("[lora]", schema.Lora, "No LoRA: the words alone are learned.")
TEXT_LORA = Table("[text_lora]", schema.TextLora, "A LoRA of the CLIP encoder beside the transformer's.", off=True)
TRAIN = Table("[train]", schema.Train)
ADAMW = Table("[optimizer]", schema.AdamW, 'AdamW; "adamw8bit" has the same keys and needs bitsandbytes.', off=True)
PRODIGY = Table(
    "[optimizer]", schema.Prodigy, "Or Prodigy, which finds the learning rate by itself: leave train.lr out.", True,
    {"name": "prodigy"},
)  # fmt: skip
PRIOR = Table(
    "[prior]", schema.Prior, "Prior preservation: pictures of the class, made by the base where there are too few.", True,
    {"images": "class-images", "prompt": "a photo of a dog"},
)  # fmt: skip
COMMON_TABLES = (
    Table("[schedule]", schema.Schedule, "How the learning rate changes."),
    PRIOR,
    Table("[validate]", schema.Validate, "Pictures, and the loss on held-out ones, while it trains."),
    Table("[stop]", schema.Stop, "Early stopping, by the loss that is taken every validate.every steps."),
    Table("[checkpoint]", schema.Checkpoint),
    Table("[export]", schema.Export),
    Table("[track]", schema.Track),
    Table("[hub]", schema.Hub, "A login comes from `hf auth login` or HF_TOKEN: no secret may stand here."),
    Table("[notify]", schema.Notify),
    Table("[compute]", schema.Compute),
)

# Values of the commented lines where a key has no default of its own, or none that would be of use there.
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
# Alternatives to a key, shown in a comment below it.
INSTEAD: Mapping[str, tuple[str, Values]] = {
    "data.source": (
        "for a data set of the hub",
        {"source": "owner/data-set", "config": "default", "caption_column": "text"},
    ),
    "train.steps": ("in passes over the pictures", {"epochs": 20}),
}
SEVERAL: Mapping[str, tuple[Any, ...]] = {  # more than one commented line for a key
    "train.weighting": (
        {"scheme": "logit_normal", "mean": 0.0, "std": 1.0},
        {"scheme": "mode", "scale": 1.29},
        {"scheme": "sigma_sqrt"},
        {"scheme": "cosmap"},
    ),
}
ABOUT = {  # where the models' own words would not do in a file
    "extends": "A TOML file that this one is laid over: for what several specs share",
    "model.gradient_checkpointing": 'Recompute activations in the backward pass: less memory, slower (true; "selective", the '
    "cheapest of all; or n, every n-th block)",
    "inversion.encoders": 'Encoders that learn rows: ["clip"] or ["clip", "t5"]',
    "train.weighting": "Timesteps are drawn evenly, or by one of these",
    "track.to": 'Trackers: "tensorboard", "wandb", or none',
}


@dataclass(frozen=True)
class Template:
    """tables: in their order; values: values of the lines that are no comments; short: the keys of --short; sweep: an
    example of one; shown: in commented lines, where EXAMPLES would not be this template's defaults."""

    what: str
    tables: tuple[Table, ...]
    values: Values
    short: tuple[str, ...]
    sweep: Values
    shown: Values = field(default_factory=dict)


BASE: Values = {"model.base": DEFAULT_BASE, "data.source": "my-pictures"}
COMMON_VALUES: Values = {"train.steps": 1000, "validate.every": 250}
SHORT_KEYS = ("model.base", "data.source", "data.prompt", "data.resolution")
TRAINED = ("train.steps", "train.batch_size", "train.lr", "validate.prompts", "validate.every")
TEMPLATES = {
    "pivotal": Template(
        "pivotal tuning, new words learned beside a LoRA",
        (MODEL, DATA, TOKENS, INVERSION, LORA, TRAIN, ADAMW, PRODIGY, *COMMON_TABLES),
        {
            **BASE, "data.prompt": "a photo of TOK", "tokens.name": "TOK",
            **COMMON_VALUES, "validate.prompts": ["a photo of TOK on a beach"],
        },
        (*SHORT_KEYS, "tokens.name", "inversion.encoders", "lora.rank", *TRAINED),
        {"lora.rank": [8, 16, 32], "train.lr": [1e-4, 4e-4]},
    ),
    "lora": Template(
        "a LoRA alone",
        (MODEL, DATA, LORA, TEXT_LORA, TRAIN, ADAMW, PRODIGY, *COMMON_TABLES),
        {
            **BASE, "data.prompt": "a photo of ohwx dog",
            **COMMON_VALUES, "validate.prompts": ["a photo of ohwx dog on a beach"],
        },
        (*SHORT_KEYS, "lora.rank", "lora.layers", *TRAINED),
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
        (*SHORT_KEYS, "tokens.name", "tokens.vectors", "inversion.encoders", "lora.until", *TRAINED),
        {"train.lr": [1e-3, 4e-3], "seed": [0, 1]},
        {"inversion.until": 1.0, "inversion.lr": 1e-3},
    ),
}  # fmt: skip


def new_spec(template: str, changes: Values, *, short: bool, plan: str, queue: str) -> str:
    """TOML text. changes: by dotted key, beside or instead of the template's own; None leaves a key to its default.

    plan, queue: the commands to type for it.
    """
    chosen = TEMPLATES[template]
    values = {key: value for key, value in {**chosen.values, **changes}.items() if value is not None}
    shown = {**EXAMPLES, "validate.size": values.get("data.resolution", 512), **chosen.shown}
    head = FIRST + (SHORT_HEAD if short else HEAD).format(what=chosen.what, needed=NEEDED, plan=plan, queue=queue)
    if short:
        keys = {*chosen.short, *values} - {key for key, value in changes.items() if value is None}
        on = [table for table in chosen.tables if not table.off]
        tables = [_top(values, short=True), *(_short_table(table, keys, values, shown) for table in on)]
    else:
        tables = [_top(values), *(_table(table, values, shown) for table in chosen.tables), _sweep(chosen.sweep)]
    return head + "".join(f"\n{table}" for table in tables if table)


def _short_table(table: Table, keys: set[str], values: Values, shown: Values) -> str:
    lines = [
        _line("", name, values.get(key, _default(table, name, shown)), _about(table, name))
        for name in table.model.model_fields
        if (key := f"{table.path}.{name}") in keys
    ]
    return "".join([f"{table.heading}\n", *lines]) if lines else ""


def _top(values: Values, *, short: bool = False) -> str:
    about = {key: schema.Spec.model_fields[key].description or "" for key in ("name", "seed")} | {
        "extends": ABOUT["extends"]
    }
    return "".join(
        _line("" if key in values else "# ", key, values.get(key, EXAMPLES.get(key, 0)), said)
        for key, said in about.items()
        if key in values or not short
    )


def _table(table: Table, values: Values, shown: Values) -> str:
    heading = f"# {table.heading}\n" if table.off else f"{table.heading}\n"
    return "".join([f"# {table.note}\n" if table.note else "", heading, *_lines(table, values, shown)])


def _lines(table: Table, values: Values, shown: Values) -> Iterator[str]:
    instead = {f"{key.partition('.')[0]}.{name}" for key, (_, others) in INSTEAD.items() for name in others}
    names = ["until"] if table is NO_LORA else list(table.model.model_fields)
    for name in sorted(names, key=lambda name: name not in table.chosen):  # what is needed comes first
        key, about = f"{table.path}.{name}", _about(table, name)
        if key in SEVERAL:
            yield f"# {about}:\n"
            yield from (_line("# ", name, value, "") for value in SEVERAL[key])
        elif name in table.chosen:
            yield _line("# ", name, table.chosen[name], f"{NEEDED} {about}".strip())
        elif key in values and not table.off:
            yield _line("", name, values[key], about)
        elif key in INSTEAD or key not in instead:
            yield _line("# ", name, _default(table, name, shown), about)
        if key in INSTEAD:
            when, others = INSTEAD[key]
            yield f"# Instead of {name}, {when}: {', '.join(toml_line(*one) for one in others.items())}\n"


def _sweep(example: Values) -> str:
    note = "# Several runs by this one spec: one for each combination of the values listed.\n[sweep]\n"
    return note + "".join(_line("# ", key, values, "") for key, values in example.items())


def _line(mark: str, name: str, value: Any, about: str) -> str:
    """`key = value  # about`, continued below where it is too long for a line."""
    text = f"{mark}{toml_line(name, value)}"
    if not about:
        return f"{text}\n"
    text = f"{text:<{COLUMN - 2}}  "
    first, *more = textwrap.wrap(about, WIDTH - 2 - COLUMN, initial_indent=" " * (len(text) - COLUMN))
    return f"{text}# {first.strip()}\n" + "".join(f"{' ' * COLUMN}# {line}\n" for line in more)


def _about(table: Table, name: str) -> str:
    """What a key means, and its values where they are few."""
    found = table.model.model_fields[name]
    if (about := ABOUT.get(f"{table.path}.{name}")) is not None:
        return about
    about = found.description or ""
    names = [one for one in _choices(found.annotation) if not one.startswith("_")]
    all_named = len(names) < 2 or all(one in about for one in names)
    return about if all_named else f"{about} ({', '.join(names)})"


def _choices(annotation: Any) -> list[str]:
    """The texts that a key may be."""
    if get_origin(annotation) is Literal:
        return [one for one in get_args(annotation) if isinstance(one, str)]
    return [name for inner in get_args(annotation) for name in _choices(inner)]


def _default(table: Table, name: str, shown: Values) -> Any:
    """What a commented line shows."""
    value = shown.get(f"{table.path}.{name}", table.model.model_fields[name].get_default())
    return list(value) if isinstance(value, tuple) else value
