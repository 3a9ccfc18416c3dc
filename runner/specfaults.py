"""What is wrong with one key, in words: the value found, what is allowed, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from runner.spec import FORMS, Spec

Where = tuple[str | int, ...]
TAGS = {"none", "sigma_sqrt", "logit_normal", "mode", "cosmap", "adamw", "adamw8bit", "prodigy"}

# The reference script's flags, for people who come from it; what is spelt alike is found by similarity.
FLAGS = {
    "pretrained_model_name_or_path": "model.base",
    "mixed_precision": "model.dtype",
    "allow_tf32": "model.tf32",
    "dataset_name": "data.source",
    "instance_data_dir": "data.source",
    "instance_prompt": "data.prompt",
    "class_data_dir": "prior.images",
    "class_prompt": "prior.prompt",
    "num_class_images": "prior.count",
    "train_text_encoder_ti": "[[tokens]]",
    "token_abstraction": "tokens.name",
    "num_new_tokens_per_abstraction": "tokens.vectors",
    "initializer_concept": "tokens.initializer",
    "enable_t5_ti": 'inversion.encoders = ["clip", "t5"]',
    "train_text_encoder_ti_frac": "inversion.until",
    "text_encoder_lr": "inversion.lr",
    "lora_alpha": "lora.alpha",
    "lora_layers": "lora.layers",
    "train_transformer_frac": "lora.until",
    "train_text_encoder": "[text_lora]",
    "max_train_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "learning_rate": "train.lr",
    "guidance_scale": "train.guidance",
    "weighting_scheme": "train.weighting.scheme",
    "use_8bit_adam": 'optimizer.name = "adamw8bit"',
    "lr_scheduler": "schedule.name",
    "lr_warmup_steps": "schedule.warmup",
    "checkpointing_steps": "checkpoint.every",
    "checkpoints_total_limit": "checkpoint.keep",
    "validation_prompt": "validate.prompts",
    "num_validation_images": "validate.count",
    "report_to": "track.to",
    "push_to_hub": "hub.push",
    "hub_model_id": "hub.repo",
    "dataloader_num_workers": "data.workers",
}


def show(value: Any) -> str:
    """A value as found, short, with control characters escaped."""
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else text[:57] + "..."


def explain(detail: Mapping[str, Any], tables: Mapping[str, Any]) -> tuple[str, str]:
    """One pydantic error -> (dotted key, message)."""
    path = _real_path(detail["loc"], tables)
    name = ".".join(map(str, path))
    kind, found = detail["type"], f"(found {show(detail['input'])})"
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return name, _unknown(path, detail["input"], tables)
    if kind == "missing":
        return name, f"required key is missing; {_allowed(path)}"
    if kind in ("literal_error", "union_tag_invalid"):
        tag = detail["input"]
        if kind == "union_tag_invalid":
            inner = "scheme" if path[-1] == "weighting" else "name"
            tag = tag.get(inner) if isinstance(tag, Mapping) else tag
            name = f"{name}.{inner}"
        choices = _choices(context)
        field = _spec_keys().get(name)
        more = ["true", "false", "a whole number from 1"] if field and "bool" in str(field.annotation) else []
        return (
            name,
            f"not one of the names allowed (found {show(tag)}); allowed are {', '.join([*more, *choices])}"
            f"{_guess(str(tag), choices)}",
        )
    if kind == "string_pattern_mismatch" and context.get("pattern") in FORMS:
        return name, f"not of the form wanted {found}; allowed are {FORMS[context['pattern']]}"
    if kind == "string_too_long":
        return name, f"too long {found}, {len(detail['input'])} characters; at most {context['max_length']} are allowed"
    messages = {
        "int_type": "no whole number",
        "int_from_float": "no whole number",
        "float_type": "no number",
        "bool_type": "no boolean",
        "tuple_type": "no list",
        "model_type": "no table",
        "model_attributes_type": "no table",
        "string_type": "no text",
        "finite_number": "not a finite number",
        "string_too_short": "empty",
        "multiple_of": "not divisible by 16",
    }
    said = messages.get(kind, detail["msg"][0].lower() + detail["msg"][1:])
    return name, f"{said} {found}; {_allowed(path)}"


def _real_path(location: tuple[Any, ...], tables: Mapping[str, Any]) -> Where:
    """Pydantic's location less the union branches it tried, which the user never wrote."""
    out: list[str | int] = []
    here: Any = tables
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(here, Mapping):
            known = part in here or (last and part not in TAGS and "[" not in str(part) and "(" not in str(part))
            if known or (position == 0 and last):
                out.append(part)
                here = here.get(part)
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            out.append(part)
            here = here[part]
    return tuple(out)


def _choices(context: Mapping[str, Any]) -> list[str]:
    text = str(context.get("expected") or context.get("expected_tags") or "")
    return [word.strip(" '") for word in text.replace(" or ", ",").split(",") if word.strip(" '")]


def _unknown(path: Where, value: Any, tables: Mapping[str, Any]) -> str:
    wrong = str(path[-1])
    here = sorted(_keys_of(path[:-1], tables))
    text = f"unknown key (found {show(value)}); allowed here: {', '.join(here)}"
    if wrong in FLAGS:
        return f"{text}; the reference script's {wrong} is {FLAGS[wrong]} here"
    if near := difflib.get_close_matches(wrong, here, 1, 0.6):
        return f"{text}; did you mean {'.'.join(map(str, (*path[:-1], near[0])))}?"
    everywhere = _spec_keys()
    last_parts = {name.rpartition(".")[2]: name for name in everywhere}
    if near := difflib.get_close_matches(wrong, list(last_parts), 1, 0.75):
        return f"{text}; did you mean {last_parts[near[0]]}?"
    return text


def _guess(found: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(found, choices, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _allowed(path: Where) -> str:
    """What the key's description and limits say."""
    field = _spec_keys().get(".".join(str(part) for part in path if not isinstance(part, int)))
    if field is None:
        return "see `fluxrun schema`"
    limits = [_limit(item) for item in _metadata(field)]
    kinds = _kind(field.annotation)
    wanted = ", ".join(part for part in (kinds, *limits) if part)
    return f"wanted is {wanted} ({field.description})" if field.description else f"wanted is {wanted}"


def _metadata(field: Any) -> list[Any]:
    found = list(field.metadata)
    for part in (field.annotation, *get_args(field.annotation)):
        for item in getattr(part, "__metadata__", ()):
            found += getattr(item, "metadata", [item])
    return found


def _limit(item: Any) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}
    limits = {name: getattr(item, name, None) for name in words}
    parts = [f"{words[name]} {limit:g}" for name, limit in limits.items() if limit is not None and limit != 2**31]
    return ", ".join(parts)


def _kind(annotation: Any) -> str:
    text = str(annotation)
    names = [
        name
        for name, mark in (
            ("a table", "runner.spec."),
            ("a list", "tuple["),
            ("true or false", "bool"),
            ("a whole number", "int"),
            ("a number", "float"),
            ("text", "str"),
        )
        if mark in text.replace("strict", "").replace("string", "")
    ]
    if annotation in (int, float, str, bool):
        names = [{int: "a whole number", float: "a number", str: "text", bool: "true or false"}[annotation]]
    if text.startswith("tuple["):  # a list and nothing else
        names = [f"a list of {name}" for name in names if name == "text"] or ["a list"]
    if "Literal[" in text:
        names = [
            *(n for n in names if n == "a list" or "true or false" in names),
            "one of " + text[text.index("Literal[") + 8 :].split("]")[0].replace("'", ""),
        ]
    return " or ".join(dict.fromkeys(names)) or "another value"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


@cache
def _spec_keys() -> dict[str, Any]:
    return dict(_all_keys(Spec))


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of the spec with its field; the tables of a union are laid over each other."""
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        yield dotted, field
        for inner in _models(field.annotation):
            yield from _all_keys(inner, f"{dotted}.")


def _keys_of(path: Where, tables: Mapping[str, Any]) -> set[str]:
    """The keys allowed in the table at `path`; of a union, those of the kind that the table names."""
    models: list[type[BaseModel]] = [Spec]
    here: Any = tables
    for part in path:
        within: Any = here
        here = within[part] if isinstance(here, Mapping | list | tuple) else None
        if not isinstance(part, int):
            models = [
                inner
                for model in models
                for name, field in model.model_fields.items()
                if (field.alias or name) == part
                for inner in _models(field.annotation)
            ]
    if isinstance(here, Mapping):
        tag = here.get("name", here.get("scheme"))
        chosen = [
            m
            for m in models
            if any(tag in get_args(f.annotation) for n, f in m.model_fields.items() if n in ("name", "scheme"))
        ]
        models = chosen or models
    extra = {"sweep", "extends"} if not path else set()
    return {field.alias or name for model in models for name, field in model.model_fields.items()} | extra
