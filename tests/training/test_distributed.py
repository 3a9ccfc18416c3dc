"""The ranks of one run meet at a port that nobody can take from them."""

from __future__ import annotations

import socket

import pytest

from runner.training.distributed import Ranks


def test_the_port_of_the_meeting_is_held_from_the_first_moment() -> None:
    first, second = Ranks(0, 2).meet(), Ranks(0, 2).meet()
    assert first.port != second.port
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", first.port))
    found = Ranks(1, 2).find(first.port)
    first.set("step", "7")
    assert found.get("step") == b"7"
