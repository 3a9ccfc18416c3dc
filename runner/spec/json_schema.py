"""JSON Schema of a spec file: for editors (`fluxrun schema`), and what `runner.spec.keys` reads the keys from."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

from runner.spec.schema import Spec


@cache
def models_schema() -> dict[str, Any]:
    """As pydantic makes it of the models. Not to be changed: it is cached, since it takes a while."""
    return Spec.model_json_schema(by_alias=True)


def json_schema() -> dict[str, Any]:
    """For a spec file, which also has `extends` and [sweep], and whose required keys may be in the file that it
    extends."""
    schema = copy.deepcopy(models_schema())
    for table in ("Model", "Data"):
        schema["$defs"][table].pop("required")
    del schema["required"]
    schema["if"] = {"not": {"required": ["extends"]}}
    schema["then"] = {
        "required": ["model", "data", "train"],
        "properties": {"model": {"required": ["base"]}, "data": {"required": ["source"]}},
    }
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "A TOML file, relative to this one, that this file is merged over",
    }
    schema["properties"]["sweep"] = {
        "type": "object",
        "description": "Dotted keys with lists of values: one run for each combination",
        "additionalProperties": {"type": "array", "minItems": 1},
    }
    schema["title"] = "fluxrun spec"
    return schema


def schema_text() -> str:
    return json.dumps(json_schema(), indent=1) + "\n"
