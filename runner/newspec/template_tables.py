"""The tables, values and comments of the specs that `fluxrun new` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from runner.spec import schema

DEFAULT_BASE = "black-forest-labs/FLUX.1-dev"

Values = Mapping[str, Any]  # by dotted key


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
    --short; sweep: an example; shown: values of commented lines, where those of EXAMPLES are not this template's
    defaults.
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
