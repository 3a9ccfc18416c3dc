"""The JSON schema of a spec."""

from __future__ import annotations

from runner.spec.json_schema import json_schema


def test_the_schema_allows_required_keys_to_be_inherited() -> None:
    """A spec alone must name its base; one that extends another need not."""
    schema = json_schema()
    assert schema["if"] == {"not": {"required": ["extends"]}}
    assert schema["then"]["properties"] == {"model": {"required": ["base"]}, "data": {"required": ["source"]}}
    assert "required" not in schema
    assert "required" not in schema["$defs"]["Model"]
    assert schema["$defs"]["Token"]["required"] == ["name"]
    assert schema["properties"]["extends"]["type"] == "string"
