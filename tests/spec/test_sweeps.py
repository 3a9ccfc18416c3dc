"""What [sweep] asks for: a name of its own for each value, the same in every night; how many runs; how much work that
is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from runner.base import architectures, layers
from runner.spec import extends, loader, sweeps, toml_lines
from runner.spec.loader import load
from tests.support.house import House
from tests.support.paths import PROJECT


def swept(house: House, file: str = "s", head: str = "", /, **lists: list[Any]) -> Path:
    path = house.spec(file)
    sweep = tomli_w.dumps({"sweep": {key.replace("__", "."): values for key, values in lists.items()}})
    path.write_text(head + path.read_text() + sweep)
    return path


def names(house: House, path: Path) -> dict[str, Any]:
    """The part of each run's name behind the last `=`, and the value that it stands for."""
    found = json.loads(house.fluxrun("plan", path.name, "--json").out)
    assert found["errors"] == []
    swept = [one.source.swept for one in load([path])]
    return {
        run["name"].rpartition("=")[2]: value
        for run, values in zip(found["runs"], swept, strict=True)
        for value in values.values()
    }


def test_each_value_has_a_different_name(house: House) -> None:
    """The letters are kept, or spelt without their accents; what they leave out is in the digest."""
    words = ["a TOK", "ein TOK, grün", "ein TOK, grun", "猫 TOK", "犬 TOK", "ein TOK-gr/n", "TOK", "tok TOK"]
    found = names(house, swept(house, validate__prompts=[[word] for word in words]))
    assert list(found) == [
        "a-TOK", "ein-TOK-grun-a171b6e3", "ein-TOK-grun", "TOK-ebb6401b", "TOK-f9ed37a6", "ein-TOK-gr-n", "TOK", "tok-TOK",
    ]  # fmt: skip


def test_the_documented_names_are_right(house: House) -> None:
    """docs/run-names.md"""
    shown = (PROJECT / "docs" / "run-names.md").read_text()
    [name] = names(house, swept(house, data__prompt=["ein TOK, grün"]))
    assert f"| `ein TOK, grün` | `{name}`:" in shown


def test_numbers_and_plain_words_are_written_unchanged(house: House) -> None:
    """So that runs of earlier nights are found again."""
    cases: dict[str, tuple[list[Any], list[str]]] = {
        "lora__rank": ([4, 8], ["4", "8"]),
        "train__lr": ([1e-4, 0.5], ["0.0001", "0.5"]),
        "data__buckets": ([True, False], ["True", "False"]),
        "data__interpolation": (["lanczos", "nearest"], ["lanczos", "nearest"]),
        "data__resolution": ([[64, 128], 64], ["64-128", "64"]),
        "model__gradient_checkpointing": ([False, 2, "selective"], ["False", "2", "selective"]),
        "data__prompt": (["a TOK on a hill", "TOK_1.5+x"], ["a-TOK-on-a-hill", "TOK_1.5+x"]),
    }
    for key, (values, expected) in cases.items():
        assert list(names(house, swept(house, **{key: values}))) == expected


def test_negative_numbers_keep_their_sign(house: House) -> None:
    path = swept(house, train__weighting__mean=[-1.0, 1.0])
    path.write_text(
        path.read_text().replace("[checkpoint]", '[train.weighting]\nscheme = "logit_normal"\n[checkpoint]')
    )
    assert names(house, path) == {"-1.0": -1.0, "1.0": 1.0}


@pytest.mark.parametrize(
    "values",
    [
        ["a TOK", "a/TOK", "a TOK!", "A tok TOK", "a-TOK"],
        ["TOK", "tok"],
        ["猫 TOK", "犬 TOK", "!!!TOK", "TOK ***"],
        ["a TOK " + "on a very long hill " * 4 + end for end in ("left", "right", "rïght")],
        ["TOK.", "TOK"],
    ],
    ids=str,
)
def test_values_that_would_read_the_same_differ(house: House, values: list[str]) -> None:
    found = names(house, swept(house, data__prompt=values))
    assert list(found.values()) == values
    assert len({name.lower() for name in found}) == len(values)
    assert all(len(name) <= sweeps.LONGEST_VALUE + 1 + sweeps.DIGEST for name in found)
    assert not [name for name in found if name.endswith(".")]


def test_another_value_in_the_list_changes_no_name(house: House) -> None:
    values = ["猫 TOK", "a TOK", "grün TOK", "x" * 60 + " TOK"]
    before = names(house, swept(house, data__prompt=values))
    more = ["犬 TOK", *reversed(values), "grun TOK", "TOK"]
    after = names(house, swept(house, data__prompt=more))
    assert before.items() <= after.items()


def test_a_name_that_gets_too_long_is_shortened(house: House) -> None:
    prompts = [f"a TOK on a {colour} background in soft light" for colour in ("red", "green")]
    lists: dict[str, list[Any]] = {
        "data__prompt": prompts,
        "validate__prompts": [[one] for one in prompts],
        "lora__layers": [["attn.to_q"], ["attn.to_k"]],
    }
    path = swept(house, "s", f'name = "{"n" * 120}"\n', **lists)
    told = [one.spec.name for one in load([path])]
    assert len(set(told)) == 8
    assert max(map(len, told)) <= 200
    assert told[0].startswith("n" * 120 + "/data.prompt=a-TOK-on-a-red-b-")
    path.write_text(path.read_text().replace("n" * 120, "n" * 191, 1))
    said = house.fluxrun("plan", path.name)
    assert said.err == (
        "s.toml:1: name: expected at most 190 characters in the name of a sweep, got 191; shorten it\n1 fault; nothing was started\n"
    )
    path.write_text(path.read_text().replace("n" * 191, "n" * 190, 1))
    assert [len(one.spec.name) <= 200 for one in load([path])] == [True] * 8


# ---- found again ---------------------------------------------------------------------------------------------------


def lay(house: House, done: House, name: str, prompt: str) -> None:
    """A finished run under this name, with this prompt of its pictures."""
    folder = house.folder / "runs" / name
    shutil.copytree(done.folder / "runs" / "a", folder)
    spec = folder / "spec.toml"
    text = spec.read_text().replace('name = "a"', f"name = {json.dumps(name)}", 1)
    assert '"a TOK on a white background"' in text
    spec.write_text(text.replace('"a TOK on a white background"', json.dumps(prompt, ensure_ascii=False)))


def planned(house: House, prompts: list[str]) -> list[str]:
    path = swept(house, validate__prompts=[[prompt] for prompt in prompts])
    runs = json.loads(house.fluxrun("plan", path.name, "--json").out)["runs"]
    return [run["name"].removeprefix("s/validate.prompts=") for run in runs]


def test_runs_that_an_earlier_version_named_are_found_again(house: House, done: House) -> None:
    """0.1 wrote `ein-TOK-gr-n` and `TOK`; a name that lies there with another value is not taken."""
    prompts = ["ein TOK, grün", "猫 TOK", "犬 TOK"]
    fresh = planned(house, prompts)
    lay(house, done, "s/validate.prompts=ein-TOK-gr-n", prompts[0])
    lay(house, done, "s/validate.prompts=TOK", prompts[2])
    assert planned(house, prompts) == ["ein-TOK-gr-n", fresh[1], "TOK"]
    assert planned(house, ["TOK!"]) == ["TOK-7d98b992"]


def test_runs_keep_their_names_whatever_else_is_in_the_list(house: House, done: House) -> None:
    both = planned(house, ["a TOK", "a/TOK"])
    assert [name[:6] for name in both] == ["a-TOK-"] * 2
    assert planned(house, ["a TOK"]) == ["a-TOK"]
    lay(house, done, f"s/validate.prompts={both[0]}", "a TOK")
    assert planned(house, ["a TOK"]) == both[:1]


def test_a_swept_folder_matches_its_absolute_path(house: House, done: House) -> None:
    (house.folder / "my pictures").symlink_to("pictures")
    path = swept(house, data__source=["my pictures"])
    folder = house.folder / "runs" / "s" / "data.source=my-pictures"
    shutil.copytree(done.folder / "runs" / "a", folder)
    spec = folder / "spec.toml"
    spec.write_text(
        spec.read_text()
        .replace('name = "a"', 'name = "s/data.source=my-pictures"')
        .replace(str(done.folder), str(house.folder))
    )
    assert "s/data.source=my-pictures  (s.toml)  resume: what is" in house.fluxrun("plan", path.name).out


# ---- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lists", "fault"),
    [
        ({"lora__rank": [4, 8, 4]}, "sweep.lora.rank: expected each value once, got 4 twice; remove one"),
        (
            {"tokens__1__name": ["X", "Y"]},
            "sweep.tokens.1.name: expected an entry that tokens has (tokens.0 is the first of 1), got tokens.1",
        ),
    ],
)
def test_invalid_sweeps_are_refused(house: House, lists: dict[str, list[Any]], fault: str) -> None:
    path = swept(house, **lists)
    line = len(path.read_text().splitlines()) - len(next(iter(lists.values()))) - 1
    said = house.fluxrun("plan", path.name)
    assert (said.code, said.err) == (2, f"s.toml:{line}: {fault}\n1 fault; nothing was started\n")


def test_a_misspelt_swept_key_is_one_fault(house: House) -> None:
    """A sweep overrides what is set, so nothing is to be taken out."""
    path = swept(house, lora__rnk=[2, 4])
    assert "rank = 4\n" in path.read_text()
    line = path.read_text().partition('"lora.rnk"')[0].count("\n") + 1
    said = house.fluxrun("plan", path.name)
    assert (said.code, said.err) == (
        2,
        f"s.toml:{line}: lora.rnk: unknown key, got rnk in [sweep]; allowed here: alpha, dropout, layers, rank, until; did you "
        "mean lora.rank?\n1 fault; nothing was started\n",
    )
    path.write_text(path.read_text().replace("rnk", "rank"))
    assert house.fluxrun("plan", path.name).code == 0


def test_a_misspelt_key_beside_the_right_one_in_the_same_sweep(house: House) -> None:
    path = swept(house, lora__rnk=[2, 4], lora__rank=[2, 4])
    said = house.fluxrun("plan", path.name)
    first, last = said.err.splitlines()
    assert first.endswith("; lora.rank is already set, so remove this one")
    assert last == "1 fault; nothing was started"


def test_an_entry_of_a_list_can_be_swept(house: House) -> None:
    path = swept(house, tokens__0__initializer=["red heart", "blue ring"])
    assert [one.spec.tokens[0].initializer for one in load([path])] == ["red heart", "blue ring"]


def test_a_sweeps_name_has_no_slash(house: House) -> None:
    said = house.fluxrun("plan", swept(house, "s", 'name = "a/b"\n', lora__rank=[2, 4]).name)
    assert said.err == (
        "s.toml:1: name: expected no / in the name of a sweep, whose runs are called NAME/KEY=VALUE, got 'a/b'; remove it\n"
        "1 fault; nothing was started\n"
    )
    said = house.fluxrun("plan", swept(house, "s", 'name = "a b"\n', lora__rank=[2, 4]).name)
    assert said.err.count(" with at most one / between, got 'a b' (") == 1


class Counted:
    """Counts the calls of a function, which goes on doing what it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        self.real, self.calls = getattr(where, name), 0
        monkeypatch.setattr(where, name, self)

    def __call__(self, *rest: Any, **more: Any) -> Any:
        self.calls += 1
        return self.real(*rest, **more)


def test_too_many_runs_are_refused_before_one_is_made(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Counted(monkeypatch, loader, "_with_values")
    path = swept(house, lora__rank=[*range(1, 101)], seed=[*range(100)], train__batch_size=[*range(1, 101)])
    line = path.read_text().splitlines().index("[sweep]") + 1
    said = house.fluxrun("queue", path.name)
    assert (said.code, said.err) == (
        2,
        f"s.toml:{line}: sweep: asks for 1,000,000 runs (100 of lora.rank x 100 of seed x 100 of train.batch_size); at most "
        "10,000 are allowed in one command; remove values, or sweep fewer keys at a time\n1 fault; nothing was started\n",
    )
    assert made.calls == 1  # of the first, for whatever else is wrong


def test_specs_together_are_counted_too(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Counted(monkeypatch, loader, "_with_values")
    for name in ("x", "y", "z"):
        swept(house, name, seed=[*range(100)], lora__rank=[*range(1, 41)])
    said = house.fluxrun("check", "x.toml", "y.toml", "z.toml")
    assert said.code == 2
    assert (
        "sweep: 3 specs ask for 12,000 runs together, this one for 4,000; at most 10,000 are allowed in one command; queue "
        "some of them after the others"
    ) in said.out
    assert made.calls == 3


# ---- how much work -------------------------------------------------------------------------------------------------


def test_a_sweep_reads_and_plans_once_what_its_runs_share(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred runs read the base, the pictures and the file as often as four do."""
    from runner.data import sources
    from runner.jobs import bases, cache_hits, card_fit, memory

    counts = []
    for rates in (2, 50):
        with monkeypatch.context() as patch:
            watched = [
                Counted(patch, bases, "fingerprint"), Counted(patch, cache_hits, "fingerprint"),
                Counted(patch, bases, "transformer_config"), Counted(patch, card_fit, "read_base_configs"),
                Counted(patch, sources, "read_source"), Counted(patch, extends, "read_toml"),
                Counted(patch, memory, "estimate"), Counted(patch, layers, "lora_layers"),
            ]  # fmt: skip
            path = swept(house, train__lr=[round(1e-4 * n, 6) for n in range(1, rates + 1)], lora__rank=[2, 4])
            architectures._adapted_layers.cache_clear()
            assert len(json.loads(house.fluxrun("plan", path.name, "--json").out)["runs"]) == 2 * rates
            counts.append([one.calls for one in watched])
    assert all(counts[0])
    assert counts[0] == counts[1]


def test_a_base_that_many_extend_is_read_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.spec("base")
    (house.folder / "night").mkdir()
    for number in range(20):
        house.write(f"night/{number}.toml", f'extends = "../base.toml"\nseed = {number}\n')
    read = Counted(monkeypatch, extends, "read_toml")
    assert len(load([house.folder / "night"])) == 20
    assert read.calls == 21


class Text(str):
    """Counts how many characters are looked at when newlines are counted in it."""

    looked = 0

    def count(self, *rest: Any) -> int:
        Text.looked += len(self) + 1
        return str.count(self, *rest)

    def __getitem__(self, where: Any) -> Text:
        return Text(str.__getitem__(self, where))


@pytest.mark.parametrize("line", ["# a comment\n", "\n", "key{} = 1\n", "[table{}]\n", '[[tokens]]\nname = "T{}"\n'])
def test_lines_are_found_in_one_pass(line: str) -> None:
    """Ten times the text is ten times the work."""
    looked = []
    for count in (200, 2000):
        text, Text.looked = "".join(line.format(f"{n:04}") for n in range(count)), 0
        found = list(toml_lines._statements(Text(text)))
        assert sum(statement.count("\n") + 1 for _, statement in found) == text.count("\n") + 1
        assert [number for number, _ in found] == [*range(1, text.count("\n") + 2)]
        looked.append(Text.looked)
    assert 0 < looked[1] <= 11 * looked[0]


def test_notifications_cannot_be_swept(house: House) -> None:
    """An address is a secret, and a swept value would stand in the run's name."""
    spec = house.spec()
    spec.write_text(spec.read_text() + '[sweep]\n"notify.url" = ["https://hooks.slack.com/services/T/B/secret"]\n')
    said = house.fluxrun("plan", spec)
    assert said.code == 2
    assert (
        "sweep.notify.url: all runs of a sweep send the same notifications; write it below [notify] instead of [sweep]"
        in said.err
    )
    assert "secret" not in said.err
