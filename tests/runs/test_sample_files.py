"""The tags of sample files."""

from __future__ import annotations

from runner.runs.sample_files import sample_tag


def test_the_same_prompt_and_seed_have_the_same_tag() -> None:
    assert sample_tag("a TOK on snow", 3) == "samples/a-TOK-on-snow/3"
    others = [sample_tag(prompt, 3) for prompt in ("a TOK, on snow", "a TOK on snow!", "雪", "x" * 50, "x" * 60, "")]
    assert len(set(others)) == 6
    assert all(tag.count("/") == 2 for tag in others)
