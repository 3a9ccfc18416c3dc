"""A hub that does not answer: what is not known is said, what needs it fails by itself, and everything else goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from runner.core import hub as ours
from tests.support.house import House, Said
from tests.support.hub import Hub, hub

AWAY = "is not on this disk, and whether it can be fetched is unknown: the hub does not answer"
REST = "the run fails if it cannot, and the others go on"
REFUSED = "(ConnectError: [Errno 111] Connection refused)"
Patch = pytest.MonkeyPatch


@pytest.fixture
def closed(monkeypatch: Patch, tmp_path: Path) -> str:
    """The address of a hub that is not there."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{port.getsockname()[1]}"
    return at(address, monkeypatch, tmp_path)


@pytest.fixture
def there(monkeypatch: Patch, tmp_path: Path) -> Iterator[Hub]:
    with hub("someone") as there:
        at(there.address, monkeypatch, tmp_path)
        yield there


def at(address: str, monkeypatch: Patch, folder: Path) -> str:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return address


def warnings(said: Said) -> list[str]:
    return [one["message"] for one in json.loads(said.out)["findings"] if one["level"] == "warning"]


def test_runs_whose_base_cannot_be_fetched_do_not_keep_the_others_from_training(house: House, closed: str) -> None:
    away = [house.spec(f"away{number}", base='base = "some/model"') for number in range(3)]
    here = house.spec("here", steps="steps = 2", prompts="prompts = []")

    checked = house.fluxrun("check", *away, here)
    assert checked.code == 0, checked.out
    first, *others = away
    assert checked.out.startswith(
        f"warning: {first}:2: model.base: some/model {AWAY} {REFUSED}; {REST}\n"
        f"    the same in 2 more places: {others[0]}:2, {others[1]}:2\n"
    )

    queued = house.fluxrun("queue", *away, here, "--retries", "1", "--gpus", "cpu")
    assert queued.code == 1
    lines = queued.err.splitlines()
    why = f"some/model cannot be fetched: the hub does not answer {REFUSED}"
    for name in ("away0", "away1", "away2"):
        assert f"{name}: {why}; trying again after the runs that wait (retry 1 of 1)" in lines
        told = f"{name}: failed: {why} (attempt 2 of this queue; last checkpoint at step 0)"
        assert lines.index("here: done: runs/here/export") < next(
            number for number, line in enumerate(lines) if line.startswith(told)
        )
    states = {one["name"]: one["state"] for one in json.loads(house.fluxrun("status", "--json").out)}
    assert states == {"away0": "failed", "away1": "failed", "away2": "failed", "here": "done"}
    assert "Traceback" not in queued.err + checked.err

    other = house.spec("other", steps="steps = 1", prompts="prompts = []")
    again = house.fluxrun("queue", *away, other, "--retries", "0", "--gpus", "cpu")
    assert again.code == 1
    assert "other: done: runs/other/export" in again.err  # three in a row that fail alike stop a queue, but not these


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("500", "(HfHubHTTPError: Server error '500 Internal Server Error'"),
        ("garbage", "(JSONDecodeError: Expecting value"),
        ("asleep", "(ReadTimeout: timed out"),
        ("another form", "(TypeError: "),
    ],
)
def test_a_hub_that_answers_no_question_leaves_it_open(
    house: House, there: Hub, monkeypatch: Patch, how: str, told: str
) -> None:
    monkeypatch.setattr(ours, "ANSWER_TIMEOUT", 0.3)
    there.asleep = how == "asleep"
    there.page = {"garbage": "<html>log in to this network</html>", "another form": "[1]"}.get(how, "")
    if how == "500":
        there.refusals = {"/auth-check": (500, "")}
    said = house.fluxrun("check", house.spec(base='base = "some/model"'), house.spec("b"), "--json")
    assert said.code == 0, said.out
    [message] = [one for one in warnings(said) if "some/model" in one]
    assert message.startswith(f"some/model {AWAY} {told}")
    assert message.endswith(REST)


def test_what_the_hub_has_decided_is_an_error(house: House, there: Hub) -> None:
    there.refusals = {"/auth-check": (404, "RepoNotFound")}
    said = house.fluxrun("check", house.spec(base='base = "some/model"'))
    assert said.code == 2
    assert (
        "model.base: the hub has no model of this name, or this login may not see it (found 'some/model')" in said.out
    )


def test_pictures_on_a_hub_that_is_away(house: House, closed: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # its client's own pauses
    spec = house.spec(source='source = "someone/pictures"\nprompt = "a TOK"')
    said = house.fluxrun("check", spec)
    assert said.code == 0, said.out
    why = f"warning: {spec}:5: data.source: someone/pictures cannot be loaded: the hub does not answer ("
    assert any(line.startswith(why) and line.endswith(REST) for line in said.out.splitlines())

    counted = house.spec("b", source='source = "someone/pictures"\nprompt = "a TOK"', steps="epochs = 2")
    said = house.fluxrun("queue", counted)
    assert said.code == 2
    assert "data.source: someone/pictures cannot be loaded: the hub does not answer (" in said.err
    assert "and train.epochs counts its pictures; connect, or set train.steps instead" in said.err


def test_a_check_that_fails_itself_ends_neither_check_nor_queue(house: House, monkeypatch: Patch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("nobody foresaw this")

    monkeypatch.setattr("runner.preflight.check.check_captions", broken)
    monkeypatch.setattr("runner.preflight.check.check_disk", broken)
    spec = house.spec(steps="steps = 2", prompts="prompts = []")
    said = house.fluxrun("check", spec)
    kept = house.folder / "user-cache" / "fluxrun" / "errors.log"
    told = f"could not be checked: TypeError: nobody foresaw this ({kept} has the traceback)"
    assert said.code == 0, said.out
    assert f"warning: {spec}:5: data.source: {told}\nwarning: the disk {told}\n" in said.out
    assert kept.read_text().count("Traceback (most recent call last):") == 2
    assert 'raise TypeError("nobody foresaw this")' in kept.read_text()


def test_a_run_that_cannot_be_looked_at_is_told_with_the_others(house: House, monkeypatch: Patch) -> None:
    def unreadable(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "base/vae")

    monkeypatch.setattr("runner.jobs.bases.fingerprint", unreadable)
    spec, other = house.spec(), house.spec("b", name='name = "SKS"', base='base = "some/model"')
    said = house.fluxrun("plan", spec, other)
    assert said.code == 2
    assert (
        f"{spec}:1: this run could not be checked: PermissionError: [Errno 13] Permission denied: 'base/vae' ("
        in said.err
    )
    assert f"{other}:9: tokens.0.name: no caption names this token (found 'SKS')" in said.err


def answered(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("answered", response=httpx2.Response(status, request=httpx2.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        *[(answered(status), False) for status in (400, 401, 402, 403, 404, 409, 410, 413, 422)],
        *[(answered(status), True) for status in (408, 412, 425, 429, 500, 502, 503, 504)],
        (HFValidationError("no such name"), False),
        (OfflineModeIsEnabled("offline"), False),
        (FileNotFoundError("export"), False),
        (httpx2.ConnectError("refused"), True),
        (TimeoutError("slow"), True),
    ],
    ids=str,
)
def test_what_may_pass_and_what_may_not(error: Exception, passing: bool) -> None:
    assert ours.is_transient(error) is passing
    outer = LocalEntryNotFoundError("not in the cache")
    outer.__cause__ = error
    assert ours.is_transient(outer) is passing
