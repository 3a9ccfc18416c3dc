"""What a table of runs names: the keys that were swept or set, never a default that only follows from one of them."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

import runner
from runner.jobs.prepare import prepare_jobs
from runner.report.page import render
from runner.runs.claim import claim_run
from runner.runs.spec_differences import distinguishing_keys
from runner.spec.defaults import DERIVED_DEFAULTS, fill_defaults
from runner.tracking.hparams import write_sessions
from tests.support.house import House
from tests.support.paths import OLD_RUNS
from tests.support.run_folders import write_run
from tests.support.tensorboard import hparams, with_events

SWEEP = '\n[sweep]\n"train.lr" = [1e-4, 4e-4]\n'


def enlisted(house: House, *specs: Path) -> Path:
    """The runs folder with these specs' runs as a queue has it before it trains."""
    runs = house.folder / "runs"
    for job in prepare_jobs(list(specs), runs, fetch=False, fresh=False):
        claim_run(job.run, job.spec, job.plan, "0", job.source.origin)
        job.run.release()
    return runs


def columns(house: House) -> list[str]:
    """Of `fluxrun results`: what stands between the state and the rest."""
    head = house.fluxrun("results").out.splitlines()[0].split()
    return [word for word in head if "." in word]


def page_columns(runs: Path) -> list[str]:
    return re.findall(r'<th class="key[^>]*><button [^>]*>([^<]*)<', render(runs))


def lora_alone(house: House, name: str = "a", more: str = "") -> Path:
    text = house.spec("base", drop="[[tokens]]").read_text().replace("lr = 1e-3\n", "")
    text = re.sub(r"\[inversion\].*?(?=\[lora\])", "", text, flags=re.S).replace("a TOK", "a heart")
    return house.write(f"{name}.toml", text + more)


def test_a_swept_rate_is_the_column(house: House) -> None:
    """The resolved specs differ in inversion.lr too, whose default is train.lr."""
    runs = enlisted(house, lora_alone(house, more=SWEEP))
    assert columns(house) == ["train.lr"]
    assert page_columns(runs) == ["train.lr"]
    for folder in (runs / "a").iterdir():
        with_events(folder)
    write_sessions(runs)
    [named] = {
        tuple(info.name for info in hparams(folder)["experiment"].hparam_infos) for folder in (runs / "a").iterdir()
    }
    assert named == ("train.lr",)


def test_compare_shows_what_was_swept_and_names_what_follows(house: House) -> None:
    enlisted(house, lora_alone(house, more=SWEEP))
    said = house.fluxrun("compare", "a/train.lr=0.0001", "a/train.lr=0.0004")
    lines = [line.split() for line in said.out.splitlines()]
    assert ["train.lr", "0.0001", "0.0004"] in lines
    assert "defaults that follow from these: inversion.lr" in said.out
    assert not [line for line in lines if line[:1] == ["inversion.lr"]]
    found = json.loads(house.fluxrun("compare", "a/train.lr=0.0001", "a/train.lr=0.0004", "--json").out)
    assert list(found["differing"]) == ["train.lr", "inversion.lr"]
    assert found["following"] == ["inversion.lr"]


def test_a_refusal_names_the_key_that_was_changed(house: House) -> None:
    spec = lora_alone(house)
    enlisted(house, spec)
    spec.write_text(spec.read_text().replace("[train]", "[train]\nlr = 4e-4").replace("rank = 4", "rank = 8"))
    said = house.fluxrun("plan", spec)
    assert said.code == 2
    assert "train.lr" in said.err
    assert "lora.rank" in said.err
    assert "inversion.lr" not in said.err
    assert "lora.alpha" not in said.err


def test_what_was_set_is_shown_where_it_repeats_another_keys_values(house: House) -> None:
    house.spec("a")
    house.write("b.toml", 'extends = "a.toml"\n[lora]\nrank = 8\nalpha = 8.0\n[train]\nbatch_size = 1\n')
    enlisted(house, house.folder / "a.toml", house.folder / "b.toml")
    assert columns(house) == ["lora.rank", "lora.alpha", "train.batch_size"]


def test_swept_keys_come_before_set_ones(house: House) -> None:
    house.spec("a")
    house.write("b.toml", 'extends = "a.toml"\n[data]\nholdout = 2\n[sweep]\n"train.lr" = [1e-4, 4e-4]\n')
    enlisted(house, house.folder / "a.toml", house.folder / "b.toml")
    assert columns(house) == ["train.lr", "data.holdout"]


def test_a_swept_table_is_swept_key_by_key(house: House) -> None:
    sweep = '[sweep]\n"train.weighting" = [{scheme = "none"}, {scheme = "mode", scale = 1.0}]\n'
    runs = enlisted(house, house.write("a.toml", house.spec("base").read_text() + sweep))
    assert columns(house) == ["train.weighting.scheme", "train.weighting.scale"]
    [origin] = {record.origins["train.weighting.scheme"] for record in runner.results(runs)}
    assert origin == f"sweep in {house.folder / 'a.toml'}"


def test_a_runs_own_spec_that_is_queued_keeps_what_was_set(house: House) -> None:
    sweep = '[sweep]\n"lora.rank" = [4, 8]\n'
    runs = enlisted(house, house.write("a.toml", house.spec("base").read_text() + sweep))
    before = (runs / "a" / "lora.rank=8" / "spec.toml").read_text()
    enlisted(house, *sorted((runs / "a").glob("*/spec.toml")))
    assert (runs / "a" / "lora.rank=8" / "spec.toml").read_text() == before
    assert columns(house) == ["lora.rank"]


def test_folders_that_do_not_say_what_was_set(house: House) -> None:
    """From elsewhere, or begun anew from their own spec.toml by a version that called everything set."""
    runs = enlisted(house, lora_alone(house, more=SWEEP))
    for path in runs.glob("a/*/spec.toml"):
        path.write_text(re.sub(r"  # .*", f"  # set in {path}", path.read_text()))
    assert columns(house) == ["train.lr"]
    for rank in (2, 16):
        write_run(house.folder / "foreign", f"rank-{rank}", rank=rank)
    assert page_columns(house.folder / "foreign") == ["lora.rank"]


def test_a_comment_is_read_behind_whatever_stands_before_it(house: House) -> None:
    text = house.spec("a").read_text().replace("[data]\n", '[data]\nprompt = "a TOK  # set by hand"\n')
    runs = enlisted(house, house.write("a  # set.toml", f'name = "a"\n{text}'))
    [record] = runner.results(runs)
    assert record.spec["data.prompt"] == "a TOK  # set by hand"
    assert record.origins["data.prompt"] == f"set in {house.folder / 'a  # set.toml'}"
    assert "lora.alpha" not in record.origins


def test_a_default_that_differs_by_itself_is_shown(house: House) -> None:
    """As where a later fluxrun has another one."""
    runs = enlisted(house, house.spec("a"), house.spec("b"))
    path = runs / "b" / "spec.toml"
    path.write_text(path.read_text().replace("\ndropout = 0.0  # default", "\ndropout = 0.1  # default"))
    assert columns(house) == ["lora.dropout"]


def test_an_old_run_tells_what_was_set() -> None:
    [record] = [one for one in runner.results(OLD_RUNS / "v1" / "night") if one.name == "whole"]
    assert record.origins["train.lr"] == "set in whole.toml"
    assert record.origins["lora.layers"] == "set in whole.toml"
    assert "lora.alpha" not in record.origins
    assert record.origins["tokens.0.name"] == "set in whole.toml"


@pytest.mark.parametrize("key", [key for key, default in DERIVED_DEFAULTS.items() if default.is_copy])
def test_what_a_default_follows_is_as_the_spec_has_it(key: str) -> None:
    def filled(value: float) -> object:
        folder, last = DERIVED_DEFAULTS[key].causes[0].split(".")
        tables = {"data": {"source": "x"}, "text_lora": {}}
        tables.setdefault(folder, {})[last] = value  # type: ignore[assignment]
        folder, last = key.split(".")
        return fill_defaults(tables)[folder][last]

    assert (filled(3), filled(7)) == (3, 7)


def test_telling_keys_of_no_runs() -> None:
    assert distinguishing_keys([]) == []
    assert distinguishing_keys([runner.Record("a", "failed")]) == []


def test_the_origins_of_a_record_are_those_of_its_file(done: House) -> None:
    [record] = [one for one in runner.results(done.folder / "runs") if one.name == "a"]
    written = tomllib.loads((done.folder / "a.toml").read_text())
    for table, values in written.items():
        for key in values if isinstance(values, dict) else ():
            assert record.origins[f"{table}.{key}"] == f"set in {done.folder / 'a.toml'}"
    assert "optimizer.name" not in record.origins
