"""Placeholders in captions."""

from __future__ import annotations

from runner.data import tokens
from runner.spec.schema import Token


def test_tokens_are_replaced_as_whole_words_longest_first() -> None:
    known = tokens.placeholders([Token(name="TOK"), Token(name="TOK2", vectors=1)])
    assert (
        tokens.expand_placeholders("a TOK, TOK2's TOKYO and (TOK)", known) == "a <s0><s1>, <s2>'s TOKYO and (<s0><s1>)"
    )
    assert tokens.tokens_in_caption("TOKYO and TOK2", known) == {"TOK2"}
    assert tokens.expand_placeholders("a TOK", ()) == "a TOK"
