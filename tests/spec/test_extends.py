"""Specs that extend other files: what is merged, where faults point, where a resolved value says it came from."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from runner.cli.excerpts import excerpts
from runner.core.errors import Fault, SpecError
from runner.jobs.prepare import prepare_jobs
from runner.runs.claim import claim_run
from runner.runs.spec_file import read_spec
from runner.spec.build import LoadedSpec
from runner.spec.loader import load
from runner.spec.schema import dump
from tests.support.house import House
from tests.support.paths import PICTURES

BASE = """[model]
base = "builtin:tiny"
[data]
source = "pictures"
resolution = 64
[[tokens]]
name = "TOK"
vectors = 3
[lora]
rank = 8
layers = ["attn.to_q", "attn.to_k"]
[optimizer]
name = "prodigy"
d_coef = 2.0
"""
OWN = """extends = "shared/base.toml"
[lora]
alpha = 2.0
layers = ["attn.to_v"]
[[tokens]]
name = "ABC"
[train]
steps = 4
"""


def files(folder: Path, own: str = OWN, base: str = BASE) -> Path:
    (folder / "shared").mkdir(exist_ok=True)
    (folder / "shared" / "base.toml").write_text(base)
    (folder / "a.toml").write_text(own)
    return folder / "a.toml"


def one(path: Path) -> LoadedSpec:
    [loaded] = load([path])
    return loaded


def faults(*paths: Path) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(paths)
    return [str(fault).replace(f"{paths[0].parent}/", "") for fault in caught.value.faults]


def test_tables_merge_key_by_key_and_arrays_are_replaced(tmp_path: Path) -> None:
    spec = one(files(tmp_path)).spec
    assert (spec.name, spec.model.base, spec.data.resolution, spec.train.steps) == ("a", "builtin:tiny", 64, 4)
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.layers) == (8, 2.0, ("attn.to_v",))
    assert [(token.name, token.vectors) for token in spec.tokens] == [("ABC", 2)]
    assert dump(spec)["optimizer"]["d_coef"] == 2.0


def test_faults_in_inherited_keys_point_at_the_other_file(tmp_path: Path) -> None:
    path = files(tmp_path, OWN + "batch_size = 0\n", BASE.replace("rank = 8", "rnk = 8").replace("2.0", '"2"'))
    assert [fault.split(": ")[:2] for fault in faults(path)] == [
        ["a.toml:9", "train.batch_size"],
        ["shared/base.toml:10", "lora.rnk"],
        ["shared/base.toml:14", "optimizer.d_coef"],
    ]
    path = files(tmp_path, OWN.replace('"ABC"', '"a b"'), BASE.replace('"TOK"', '"c d"'))
    assert [fault.split(": ")[0] for fault in faults(path)] == [
        "a.toml:6"
    ]  # the other array is replaced, faults and all
    path = files(tmp_path, OWN.replace('name = "ABC"', "vectors = 1"))
    assert [fault.split(": ")[:2] for fault in faults(path)] == [["a.toml:5", "tokens.0.name"]]
    path = files(tmp_path, OWN, BASE.replace("[lora]", "[lora"))
    assert faults(path) == [
        "shared/base.toml:9: not TOML: the brackets around a table's name do not match, got `[lora`; write [lora]"
    ]


def test_an_inherited_sweep_points_at_its_file_too(tmp_path: Path) -> None:
    path = files(tmp_path, base=BASE + '[sweep]\n"lora.rank" = [4, "x"]\n')
    assert [fault.split(": ")[:2] for fault in faults(path)] == [["shared/base.toml:16", "lora.rank"]]


def test_an_inherited_path_is_relative_to_where_it_is_written(tmp_path: Path) -> None:
    path = files(tmp_path, OWN.replace("ABC", "TOK"))
    (tmp_path / "shared" / "pictures").symlink_to(PICTURES)
    [job] = prepare_jobs([path], tmp_path / "runs", fetch=False, fresh=False)
    assert job.spec.data.source == str(PICTURES)
    own = path.read_text() + '[data]\nsource = "shared/pictures"\n'
    path.write_text(own)
    [job] = prepare_jobs([path], tmp_path / "runs", fetch=False, fresh=False)
    assert job.spec.data.source == str(PICTURES)


def test_chains_of_extends_are_limited(tmp_path: Path) -> None:
    path = files(tmp_path, OWN, 'extends = "../root.toml"\n' + BASE)
    (tmp_path / "root.toml").write_text("seed = 3\n[lora]\nrank = 2\ndropout = 0.5\n")
    spec = one(path).spec
    assert (spec.seed, spec.lora.rank, spec.lora.dropout) == (3, 8, 0.5)

    (tmp_path / "root.toml").write_text('\nextends = "a.toml"\n')
    assert faults(path) == [
        "root.toml:2: extends: the files extend each other in a circle (a.toml -> base.toml -> root.toml -> a.toml); "
        "remove one extends"
    ]
    (tmp_path / "root.toml").write_text('extends = ["x.toml"]\n')
    assert faults(path) == [
        "root.toml:1: extends: expected the name of one TOML file, got ['x.toml']; write it as in extends = \"base.toml\""
    ]
    (tmp_path / "root.toml").write_text('extends = "none.toml"\n')
    assert faults(path) == [
        "root.toml:1: extends: expected an existing file, got 'none.toml'; name a TOML file, relative to this one"
    ]
    for number in range(9):
        (tmp_path / f"{number}.toml").write_text(f'extends = "{number + 1}.toml"\n')
    assert faults(tmp_path / "0.toml") == [
        "7.toml:1: extends: expected at most 8 files that extend each other, got '8.toml' after them; merge some of them"
    ]


def test_base_only_files_of_a_folder_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "a.toml").write_text(OWN.replace("shared/", ""))
    assert [loaded.spec.name for loaded in load([tmp_path])] == ["a"]
    (tmp_path / "base.toml").write_text(BASE + "[train]\nsteps = 2\n")  # a whole spec: extended or not, it is a run
    assert [loaded.spec.name for loaded in load([tmp_path])] == ["a", "base"]
    (tmp_path / "base.toml").write_text(BASE)
    assert "base.toml:1: train.steps: required key is missing" in faults(tmp_path / "base.toml")[0]


def test_the_resolved_spec_says_where_each_value_came_from(tmp_path: Path) -> None:
    own = OWN.replace("ABC", "TOK") + '[validate]\nprompts = ["a # TOK"]\n[sweep]\n"train.lr" = [0.5]\n'
    path = files(tmp_path, own)
    (tmp_path / "shared" / "pictures").symlink_to(PICTURES)
    [job] = prepare_jobs([path], tmp_path / "runs", fetch=False, fresh=False)
    claim_run(job.run, job.spec, job.plan, "0.1.0", job.source.origin)
    text = job.run.spec_file.read_text()
    assert read_spec(job.run.spec_file) == job.spec
    assert tomllib.loads(text)["fluxrun"]["version"] == "0.1.0"
    lines = text.splitlines()
    for line in (
        f'name = "a/train.lr=0.5"  # sweep in {path}',
        "seed = 0  # default",
        f'base = "builtin:tiny"  # extended from {tmp_path}/shared/base.toml',
        f"rank = 8  # extended from {tmp_path}/shared/base.toml",
        f"alpha = 2.0  # set in {path}",
        f"layers = [  # set in {path}",
        f"prompts = [  # set in {path}",
        '    "a # TOK",',
        "dropout = 0.0  # default",
        f"lr = 0.5  # sweep in {path}",
        f'name = "TOK"  # set in {path}',
        "vectors = 2  # default",
    ):
        assert line in lines
    bare = [line for line in lines if "=" in line and "  # " not in line]
    assert bare == []


# ---- carets --------------------------------------------------------------------------------------------------------


def shown(tmp_path: Path, line: str, key: str, message: str = "no whole number") -> str | None:
    file = tmp_path / "a.toml"
    file.write_text(f"\n{line}\n")
    fault = Fault(file, 2, key, message)
    return excerpts([fault]).get(fault)


@pytest.mark.parametrize(
    ("line", "key", "message", "under"),
    [
        ("rank = 0", "lora.rank", "too small", "       ^"),
        ('  rnk = "a"  # not b', "lora.rnk", "unknown key", "  ^^^"),
        ('name = "a # b"  # c', "tokens.0.name", "bad", "       ^^^^^^^"),
        ('"lora.rank" = [4, "x"]', "lora.rank", "no whole number", "              ^^^^^^^^"),
        ("[inversion]", "inversion", "no tokens", " ^^^^^^^^^"),
        ("\tsteps = x", "", "not TOML", " ^^^^^^^^^"),
    ],
)
def test_the_line_with_a_caret(tmp_path: Path, line: str, key: str, message: str, under: str) -> None:
    assert shown(tmp_path, line, key, message) == f"    2 | {line.replace(chr(9), ' ')}\n      | {under}"


def test_no_line_with_a_secret_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('hub = { token = "abc", pussh = true }\n')
    secret, other = Fault(file, 1, "hub.token", "no secret (not shown)"), Fault(file, 1, "hub.pussh", "unknown key")
    assert excerpts([secret, other]) == {}
    assert shown(tmp_path, "[data]", "model", "required key is missing; ...") is None
    gone = Fault(tmp_path / "none.toml", 1, "", "no such file")
    assert excerpts([gone]) == {}


def test_no_excerpts_are_written_into_a_pipe(house: House) -> None:
    said = house.fluxrun("plan", house.spec(rank="rnk = 4"))
    assert len(said.err.splitlines()) == 2
    assert "^" not in said.err
