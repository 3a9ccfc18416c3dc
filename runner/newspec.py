"""`fluxrun new`: a commented spec that names every key, made from the model, so that it cannot fall behind it. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from runner.spec import (
    AdamW,
    Checkpoint,
    Compute,
    Data,
    Export,
    Hub,
    Inversion,
    LogitNormal,
    Lora,
    Model,
    Notify,
    Prior,
    Schedule,
    Stop,
    TextLora,
    Token,
    Track,
    Train,
    Validate,
)  # fmt: skip

SCHEMA = "fluxrun.schema.json"
HEAD = f"""#:schema ./{SCHEMA}
# A fluxrun spec: {{what}}. Lines with a leading # show a key's default; take the # away to change it.
# `fluxrun plan FILE` checks it and says what would happen, `fluxrun queue FILE` does it.

# seed = 0
"""
Values = dict[str, Any]
# (heading, model, whether the table stands there already, values written out)
TABLES: tuple[tuple[str, type[BaseModel], bool, Values], ...] = (
    ("[model]", Model, True, {"base": "black-forest-labs/FLUX.1-dev"}),
    ("[data]", Data, True, {"source": "my-pictures", "prompt": "a photo of TOK"}),
    ("[[tokens]]", Token, True, {"name": "TOK"}),
    ("[inversion]", Inversion, True, {}),
    ("[lora]", Lora, True, {}),
    ("[text_lora]", TextLora, False, {}),
    ("[prior]", Prior, False, {"images": "class-images", "prompt": "a photo of a dog"}),
    ("[train]", Train, True, {"steps": 1000}),
    ("[train.weighting]", LogitNormal, False, {"scheme": "logit_normal"}),
    ("[optimizer]", AdamW, True, {"name": "adamw"}),
    ("[schedule]", Schedule, True, {}),
    ("[checkpoint]", Checkpoint, True, {}),
    ("[validate]", Validate, True, {"prompts": ["a photo of TOK on a beach"]}),
    ("[stop]", Stop, True, {}),
    ("[track]", Track, True, {}),
    ("[export]", Export, True, {}),
    ("[hub]", Hub, True, {}),
    ("[notify]", Notify, True, {}),
    ("[compute]", Compute, True, {}),
)
NOTES = {
    "[stop]": "Early stopping by the eval loss, which is taken every validate.every steps.",
    "[[tokens]]": "New words that the text encoders learn: pivotal tuning. Without this table: LoRA alone.",
    "[text_lora]": "LoRA of the CLIP encoder, instead of [[tokens]].",
    "[prior]": "Prior preservation: pictures of the class, made by the base where there are too few.",
    "[train.weighting]": "Density of the timesteps: sigma_sqrt, logit_normal, mode, cosmap.",
    "[optimizer]": 'Or name = "prodigy", "adamw8bit", with their own numbers.',
}


@dataclass(frozen=True)
class Template:
    """`out`: tables that stand there as comments only; `written`: values beside or instead of those of TABLES."""

    what: str
    out: frozenset[str] = frozenset()
    written: dict[str, Values] = field(default_factory=dict)


TEMPLATES = {
    "pivotal": Template("pivotal tuning, new words learned beside a LoRA"),
    "lora": Template(
        "a LoRA alone",
        frozenset({"[[tokens]]", "[inversion]"}),
        {
            "[data]": {"source": "my-pictures", "prompt": "a photo of ohwx dog"},
            "[validate]": {"prompts": ["a photo of ohwx dog on a beach"]},
        },
    ),
    "inversion": Template(
        "textual inversion alone, new words and no LoRA",
        written={
            "[inversion]": {"encoders": ["clip", "t5"], "until": 1.0, "lr": 1e-3},
            "[lora]": {"until": 0.0},
        },
    ),
}


def commented_spec(template: str = "pivotal") -> str:
    chosen = TEMPLATES[template]
    tables = [
        _table(heading, model, there and heading not in chosen.out, chosen.written.get(heading, written))
        for heading, model, there, written in TABLES
    ]
    return HEAD.format(what=chosen.what) + "".join("\n" + "\n".join(lines) + "\n" for lines in tables)


def _table(heading: str, model: type[BaseModel], there: bool, written: dict[str, Any]) -> Iterator[str]:
    if heading in NOTES:
        yield f"# {NOTES[heading]}"
    mark = "" if there else "# "
    yield f"{mark}{heading}"
    for name, about in model.model_fields.items():
        if heading == "[train]" and name == "weighting":
            continue
        if name in written:
            yield f"{mark}{toml_value(name, written[name])}{_about(about)}"
        else:
            yield f"# {toml_value(name, _default(about))}{_about(about)}"


def _about(field: FieldInfo) -> str:
    return f"  # {field.description}" if field.description else ""


def _default(field: FieldInfo) -> Any:
    default = field.get_default()
    return "" if default is None else list(default) if isinstance(default, tuple) else default


def toml_value(name: str, value: Any) -> str:
    """One `key = value` line; lists stay on it."""
    if isinstance(value, list):
        return f"{name} = [{', '.join(toml_value('', one).removeprefix(' = ') for one in value)}]"
    text: str = tomli_w.dumps({name or "v": value}).strip()
    return text if name else text.removeprefix("v")
