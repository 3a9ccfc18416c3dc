"""Webhooks and commands: who hears of what, and that nothing is lost where nobody listens."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from runner.core import notify
from runner.core.notify import Target
from tests.support.house import House


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(address, what was posted)."""
    heard: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", heard
    finally:
        server.shutdown()
        server.server_close()


def test_a_webhook_and_a_command_hear_of_every_run(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    told = house.folder / "told"
    script = house.write("tell.sh", f'echo "$FLUXRUN_EVENT|$FLUXRUN_RUN|$FLUXRUN_TEXT" >> {told}\n')
    ending = f'every = 50\n[notify]\nurl = "$HOOK/x"\ncommand = "sh {script}"'
    good = house.spec("good", steps="steps = 1", prompts="prompts = []", every=ending)
    (house.folder / "others").mkdir()
    (house.folder / "others" / "1.png").write_text("no picture")
    (house.folder / "others" / "1.txt").write_text("a TOK")
    bad = house.spec("bad", steps="steps = 1", source='source = "others"', every=ending)
    with webhook() as (address, heard):
        monkeypatch.setenv("HOOK", address)
        assert house.fluxrun("queue", bad, good, "--allow-commands", "--no-check").code == 1
    assert [(one["event"], one["run"]) for one in heard] == [
        ("run failed", "bad"),
        ("run done", "good"),
        ("queue done", ""),
    ]
    assert "not a readable image" in heard[0]["text"]
    assert heard[2]["text"] == "queue: with failures"
    assert told.read_text().splitlines() == [f"{one['event']}|{one['run']}|{one['text']}" for one in heard]
    written = [path.read_bytes() for path in (house.folder / "runs").rglob("*") if path.is_file()]
    assert written
    assert not any(address.encode() in content for content in written)


def test_a_spec_alone_runs_no_command(house: House) -> None:
    spec = house.spec(every='every = 50\n[notify]\ncommand = "touch ran"')
    said = house.fluxrun("queue", spec)
    assert said.code == 2
    assert "notify.command: this spec asks for a command (found 'touch ran'); add --allow-commands" in said.err
    assert not (house.folder / "ran").exists()
    assert not (house.folder / "runs").exists()


def test_a_variable_that_is_not_set_is_told_before_the_night(house: House) -> None:
    said = house.fluxrun("queue", house.spec(every='every = 50\n[notify]\nurl = "https://x.org/$NO_SUCH_HOOK"'))
    assert said.code == 2
    assert "notify.url: the environment has no such variable (found $NO_SUCH_HOOK); set it" in said.err


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("hooks.example.org/x", "'hooks.example.org/x'"),
        ("ftp://example.org/x", "'ftp://example.org/x'"),
        ("http://", "'http://'"),
        ("http://example.org:x/", "'http://example.org:x/'"),
        ("https://example.org/a b", "'https://example.org/a b'"),
        ("$HOOK", "'$HOOK'"),
        ("http://[::1", "one that cannot be read (not shown)"),
        ("hooks.slack.com/services/T0/B0/hidden", "another (not shown)"),
        ("ftp://me:hidden@example.org/x", "another (not shown)"),
    ],
)
def test_an_address_that_cannot_work_is_told_before_the_night(
    house: House, url: str, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", "hidden.example.org")
    spec = house.spec(every=f'every = 50\n[notify]\nurl = "{url}"')
    said = house.fluxrun("check", spec)
    assert said.code == 2
    told = said.out + said.err
    assert f"notify.url: expected an address beginning with http:// or https://, got {got}" in told
    assert "hidden" not in told


@pytest.mark.parametrize("url", ["http://[::1]:8080/x", "https://example.org", "$HOOK/x", "http://${NAME}:80/x"])
def test_an_address_that_can_work_is_taken(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", "https://example.org")
    monkeypatch.setenv("NAME", "example.org")
    assert list(notify.target_faults(Target(url, None), allow_commands=False)) == []


def test_nobody_listening_is_told_without_the_address() -> None:
    complaints: list[str] = []
    notify.send(Target("http://127.0.0.1:9/secret", None), "run done", "a", "a: done", complaints.append)
    notify.send(Target("file:///etc/passwd", None), "run done", "a", "a: done", complaints.append)
    notify.send(Target(None, "false"), "run done", "a", "a: done", complaints.append)
    assert complaints == [
        "notify.url: run done could not be sent (URLError)",
        "notify.url: run done could not be sent (ValueError)",
        "notify.command: run done could not be sent (Command '['false']' returned non-zero exit status 1.)",
    ]
