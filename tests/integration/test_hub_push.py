"""The hub: asked before the night, pushed to after it, and no run lost to it. Against a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.house import House
from tests.support.hub import Hub, hub
from tests.support.runs import export_bytes

TOKEN = "hf_of_the_environment"
PUSH = 'every = 2\n[hub]\npush = true\nrepo = "me/creature"'


def test_the_export_folder_is_pushed_as_it_is(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = house.spec(every='every = 2\n[hub]\npush = true\nrepo = "me/creature"\nprivate = true', steps="steps = 2")
    own = house.spec("b", every="every = 2\n[hub]\npush = true", steps="steps = 2")
    with hub("someone") as there:
        for name, value in {
            "HF_ENDPOINT": there.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
        }.items():
            monkeypatch.setenv(name, value)
        process = house.start("queue", spec, own)
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert [(asked["name"], asked.get("organization"), asked.get("visibility")) for asked in there.created] == [
        ("creature", "me", "private"),
        ("b", None, "public"),
    ]
    run = house.folder / "runs" / "a"
    wanted = {name.removeprefix("export/"): data for name, data in export_bytes(run).items()}
    assert there.files["me/creature"] == wanted
    assert "README.md" in there.files["someone/b"]
    assert there.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in said(run)
    assert "warning" not in json.loads((run / "state.json").read_text())


def said(run: Path) -> str:
    """Everything of a run that people may read or pass on."""
    found = [path for path in run.rglob("*") if path.suffix in (".toml", ".json", ".log", ".md")]
    assert len(found) > 4
    return "".join(path.read_text() for path in found)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub for this process: the client reads its address when it is first imported."""
    from huggingface_hub import constants

    from runner.core import hub as ours

    with hub("someone") as there:
        monkeypatch.setattr(constants, "ENDPOINT", there.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(ours, "RETRY_DELAYS", (0.01, 0.01))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield there


def test_a_push_is_tried_again(house: House, there: Hub) -> None:
    there.down = 2
    result = house.fluxrun("queue", house.spec(every=PUSH, steps="steps = 2", prompts="prompts = []"))
    assert result.code == 0, result.err
    assert there.down == 0
    assert "README.md" in there.files["me/creature"]


def test_a_push_that_fails_is_a_warning_of_a_run_that_is_done(house: House, there: Hub) -> None:
    there.down = 1000
    result = house.fluxrun("queue", house.spec(every=PUSH, steps="steps = 2", prompts="prompts = []"))
    assert result.code == 0, result.err
    assert (
        "a: done: runs/a/export\na: export: pushing to me/creature\na: warning: not pushed to me/creature" in result.err
    )
    run = house.folder / "runs" / "a"
    state = json.loads((run / "state.json").read_text())
    assert state["state"] == "done"
    assert state["warning"].endswith("`fluxrun export a --push` tries again")
    [record] = json.loads(house.fluxrun("results", "--json").out)
    assert record["warning"] == state["warning"]
    assert TOKEN not in said(run) + result.err
    before = export_bytes(run)

    there.down = 0
    again = house.fluxrun("export", "a", "--push")
    assert again.code == 0, again.err
    assert there.files["me/creature"]["a.safetensors"] == before["export/a.safetensors"]
    assert export_bytes(run) == before
    assert "warning" not in json.loads((run / "state.json").read_text())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("no token", "hub.push is true, and this machine has no login for the hub; set HF_TOKEN, or `hf auth login`"),
        ("refused", "the hub refuses this machine's token; set HF_TOKEN"),
        ("read only", "the hub's login may only read; set HF_TOKEN"),
    ],
)
def test_the_login_is_tried_before_anything_starts(
    house: House, there: Hub, wrong: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    if wrong == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    there.login = 401 if wrong == "refused" else 200
    there.role = "read" if wrong == "read only" else "write"
    spec = house.spec(every=PUSH)
    said = house.fluxrun("queue", spec)
    assert said.code == 2
    assert said.err.startswith(f"{spec}:{spec.read_text().splitlines().index('push = true') + 1}: hub.push: {told}")
    assert TOKEN not in said.err
    assert not (house.folder / "runs").exists()
    assert house.fluxrun("plan", spec).code == 0  # asks nobody
