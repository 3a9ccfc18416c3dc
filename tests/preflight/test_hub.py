"""Names of repositories: what the hub takes is known before the night, and what it refuses is not tried again."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id

from runner.core import hub as ours
from tests.support.house import House
from tests.support.hub import Hub, hub

TOKEN = "hf_of_the_environment"
RULE = (
    "allowed are NAME and OWNER/NAME of letters, digits, -, _ and ., at most 96 characters each, no -- and no .., no - or . at "
    "either end, no .git at the end"
)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub("someone") as there:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", there.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield there


def pushing(house: House, name: str = "a", repo: str = "", more: str = "") -> Path:
    own = f'\nrepo = "{repo}"' if repo else ""
    return house.spec(name, every=f"every = 2\n[hub]\npush = true{own}{more}")


def line_of(spec: Path, start: str) -> int:
    return next(number for number, line in enumerate(spec.read_text().splitlines(), 1) if line.startswith(start))


@pytest.mark.parametrize(
    ("command", "repo", "better"),
    [
        ("queue", "me/my lora (v2)", "me/my-lora-v2"),
        ("check", "me/a--b", "me/a-b"),
        ("plan", "me/up..down", "me/up.down"),
        ("plan", "me/style.git", "me/style"),
        ("plan", "me/-style.", "me/style"),
        ("plan", "me/café", "me/caf"),
        ("plan", f"me/{97 * 'x'}", f"me/{96 * 'x'}"),
    ],
)
def test_a_name_that_the_hub_does_not_take(house: House, there: Hub, command: str, repo: str, better: str) -> None:
    spec = pushing(house, repo=repo)
    said = house.fluxrun(command, spec)
    assert said.code == 2
    fault = f"the hub takes no such name (found {repo!r}); {RULE}; did you mean {better!r}?"
    assert f"{spec}:{line_of(spec, 'repo =')}: hub.repo: {fault}\n" in said.out + said.err
    validate_repo_id(better)


def test_names_that_are_taken_without_asking_are_names_that_the_hub_takes() -> None:
    draw, taken = random.Random(0), 0
    for _ in range(20_000):
        name = "".join(draw.choice("ab_1.-/") for _ in range(draw.randint(1, 8))) + draw.choice(
            ["", "", ".git", 96 * "x"]
        )
        if ours.PLAIN_ID.fullmatch(name):
            validate_repo_id(name)
            taken += 1
    assert taken > 1000


def test_an_old_spec_that_pushes_nothing_may_call_its_repository_what_it_likes(house: House) -> None:
    spec = house.spec(every='every = 2\n[hub]\nrepo = "me/my lora (v2)"')
    assert house.fluxrun("plan", spec).code == 0


def test_bases_and_pictures_of_names_that_no_hub_has(house: House) -> None:
    spec = house.spec(base='base = "me/a--b"', source='source = "me/c..d"')
    said = house.fluxrun("plan", spec)
    assert said.code == 2
    assert (
        f"{spec}:2: model.base: the hub takes no such name (found 'me/a--b'); {RULE}; did you mean 'me/a-b'?"
        in said.err
    )
    assert (
        f"{spec}:5: data.source: the hub takes no such name (found 'me/c..d'); {RULE}; did you mean 'me/c.d'?"
        in said.err
    )


def test_the_names_that_runs_get_by_themselves(house: House, there: Hub) -> None:
    spec = pushing(
        house, more='\n[sweep]\n"lora.rank" = [4, 8]\n"train.lr" = [1e-4, 3e-4]\n"lora.layers" = ["attention+mlp"]'
    )
    said = house.fluxrun("check", spec, "--json")
    assert said.code == 0, said.out
    names = [*json.loads(said.out)["runs"], "a,b", "a+b", "a..b", "x" * 200, f"{'x' * 199}y", "a.git"]
    repositories = [ours.repository(None, name) for name in names]
    assert len(names) == 10
    assert len({one.lower() for one in repositories}) == len(names)
    for one in repositories:
        validate_repo_id(one)
    assert repositories[0] == "a-lora.rank-4-train.lr-0.0001-lora.layers-attention-mlp-c193c107"
    assert ours.repository(None, "style") == "style"
    assert ours.repository(None, "night/style_2.1") == "night-style_2.1"  # as before
    assert ours.repository("me/own", "style") == "me/own"


def test_two_runs_that_push_to_one_repository(house: House, there: Hub) -> None:
    first, second = pushing(house, "a", "someone/style"), pushing(house, "b", "Style")
    said = house.fluxrun("queue", first, second)
    assert said.code == 2
    assert said.err == (
        f"{second}:{line_of(second, 'repo =')}: hub.repo: 2 runs push to one repository (found 'Style', for a, b); give each its "
        "own\n1 fault; nothing was started\n"
    )
    sweep = pushing(house, "c", "me/style", '\n[sweep]\n"lora.rank" = [2, 4]')
    said = house.fluxrun("plan", sweep)
    assert said.code == 2
    assert (
        "hub.repo: 2 runs push to one repository (found 'me/style', for c/lora.rank=2, c/lora.rank=4); take hub.repo out, and "
        "each run has a repository of its own name" in said.err
    )


def test_a_login_that_nobody_can_ask_for_is_a_warning(
    house: House, there: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    spec = pushing(house)
    said = house.fluxrun("check", spec)
    assert said.code == 0
    assert (
        f"warning: {spec}:{line_of(spec, 'push =')}: hub.push: whether the login is good is unknown: the hub does not answer "
        "(ConnectError: [Errno 111] Connection refused); where the push fails, `fluxrun export RUN --push` tries again\n"
    ) in said.out


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (401, 1), (403, 1), (404, 1), (409, 1), (412, 3)])
def test_what_the_hub_refuses_is_not_tried_again(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, tries: int
) -> None:
    monkeypatch.setattr(ours, "RETRY_DELAYS", (0.0, 0.0))
    (tmp_path / "README.md").write_text("a card")
    there.commit_status = status
    wrong = ours.push(tmp_path, "me/style", False, "a run", lambda: False)
    assert wrong is not None
    assert str(status) in wrong or "refused" in wrong
    assert TOKEN not in wrong
    assert there.commits == tries


def test_a_push_to_a_name_that_no_hub_takes_asks_nobody(there: Hub, tmp_path: Path) -> None:
    wrong = ours.push(tmp_path, "me/my lora", False, "a run", lambda: False)
    assert wrong == f"the hub takes no such name (found 'me/my lora'); {RULE}; did you mean 'me/my-lora'?"
    assert there.created == []
