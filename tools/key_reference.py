"""Writes docs/keys.md, the reference of every key a spec may hold, from the spec's models.

python tools/key_reference.py          # writes it
python tools/key_reference.py --check  # exit code 1 where the file is not what would be written
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.spec.schema import Spec

PAGE = Path(__file__).parent.parent / "docs" / "keys.md"
HEAD = """\
# Every key of a spec

Written by `python tools/key_reference.py` from the models in `runner/spec/schema.py`, so do not edit it by hand. How specs are
put together is told in [writing-specs.md](writing-specs.md).

*Default* is the value of a key that is left out: "required" where there is none, "not set" where the key then has no
effect, or takes the value that its meaning names.

`extends` (the name of a TOML file that this spec is laid over) and `[sweep]` (lists of values by dotted key, one run
for each combination) are read before the tables below: both are in [writing-specs.md](writing-specs.md).
"""
ABOUT = {  # of tables whose presence means something
    "prior": "Prior preservation; off without this table.",
    "tokens": "An array of tables: one `[[tokens]]` for each new word. Its presence turns pivotal tuning on.",
    "inversion": "How the embeddings of `[[tokens]]` are trained.",
    "text_lora": "A LoRA of the CLIP encoder; off without this table, and not together with `[[tokens]]`.",
    "train.weighting": "Density and weight of the timesteps. The other keys go with one scheme each.",
    "optimizer": "The keys below `name` are the chosen optimizer's own.",
    "stop": "Early stopping by the eval loss; needs `validate.every`.",
}
TAGS = {"train.weighting.scheme": "Which density", "optimizer.name": "Which optimizer"}
Schema = Mapping[str, Any]


def page() -> str:
    return HEAD + "".join("\n" + "\n".join(lines) + "\n" for lines in _tables())


def _tables() -> Iterator[list[str]]:
    schema = Spec.model_json_schema(by_alias=True)
    models: Mapping[str, Schema] = schema["$defs"]
    plain: dict[str, Schema] = {}
    inner: dict[str, list[Schema]] = {}
    for name, about in schema["properties"].items():
        found = _models_of(about, models)
        if found:
            inner[name] = found
        else:
            plain[name] = about
    yield ["## At the top", "", *_rows("", [{**schema, "properties": plain}])]
    for name, found in inner.items():
        deeper = {key: _models_of(about, models) for model in found for key, about in model["properties"].items()}
        deeper = {key: below for key, below in deeper.items() if below}
        yield _table(name, found, deeper)
        for key, below in deeper.items():
            yield _table(f"{name}.{key}", below)


def _table(name: str, found: list[Schema], without: Collection[str] = ()) -> list[str]:
    brackets = f"[[{name}]]" if name == "tokens" else f"[{name}]"
    about = [ABOUT[name], ""] if name in ABOUT else []
    return [f"## `{brackets}`", "", *about, *_rows(name, found, without)]


def _models_of(about: Schema, models: Mapping[str, Schema]) -> list[Schema]:
    """The tables that a field may be; [] for a plain value."""
    parts = [about, about.get("items", {}), *about.get("oneOf", ()), *about.get("anyOf", ())]
    return [models[part["$ref"].rsplit("/", 1)[-1]] for part in parts if "$ref" in part]


def _rows(table: str, found: list[Schema], without: Collection[str] = ()) -> Iterator[str]:
    """A key of several models (one for each optimizer) is one row, which says whose it is where it is not
    everyone's."""
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    keys = dict.fromkeys(key for model in found for key in model["properties"] if key not in without)
    tag = next((key for key in keys if all("const" in model["properties"].get(key, {}) for model in found)), "")
    for key in keys:
        owners = [model for model in found if key in model["properties"]]
        about = owners[0]["properties"][key]
        dotted = f"{table}.{key}" if table else key
        if key == tag:
            kinds = [model["properties"][key] for model in found]
            chosen = next(one["const"] for one in kinds if "default" in one)
            kind, default, meaning = _choice([one["const"] for one in kinds]), f"`{json.dumps(chosen)}`", TAGS[dotted]
        else:
            kind, default = _kind(about), _default(key, about, owners[0])
            meaning = about.get("description", "")
            if tag and len(owners) < len(found):
                meaning += " (" + ", ".join(model["properties"][tag]["const"] for model in owners) + ")"
        yield f"| `{dotted}` | {_cell(kind)} | {_cell(default)} | {_cell(meaning)} |"


def _default(key: str, about: Schema, model: Schema) -> str:
    if key in model.get("required", ()):
        return "not set" if "default" in about.get("description", "") else "required"  # `name` is filled in on reading
    value = about.get("default")
    return "not set" if value is None else f"`{json.dumps(value)}`"


def _kind(about: Schema) -> str:
    if "anyOf" in about:
        return ", or ".join(_kind(part) for part in about["anyOf"] if part.get("type") != "null")
    if "enum" in about:
        return _choice(about["enum"])
    if "const" in about:
        return _choice([about["const"]])
    if about["type"] == "array":
        return f"list of {_kind(about['items'])}" + (" (not empty)" if "minItems" in about else "")
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    return words[about["type"]] + _limits(about)


def _limits(about: Schema) -> str:
    told = []
    limits = {"exclusiveMinimum": "above", "minimum": "from", "maximum": "to", "exclusiveMaximum": "below"}
    for limit, word in limits.items():
        if limit in about and about[limit] != 2**31:
            told.append(f"{word} {about[limit]:g}")
    if "multipleOf" in about:
        told.append(f"in steps of {about['multipleOf']}")
    return f" {' '.join(told)}" if told else ""


def _choice(values: list[Any]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in values)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
