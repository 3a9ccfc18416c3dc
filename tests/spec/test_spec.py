"""Specs: what is accepted, what is refused, in which words and at which line."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from runner.core.errors import SpecError
from runner.spec.json_schema import json_schema
from runner.spec.keys import spec_keys
from runner.spec.loader import load
from runner.spec.schema import Spec, dump
from runner.spec.toml_lines import key_lines, line_of
from tests.support.house import House
from tests.support.paths import PROJECT

BROKEN = Path(__file__).parent / "broken"
LEAST = '[model]\nbase = "builtin:tiny"\n[data]\nsource = "x"\n[train]\nsteps = 10\n'


def test_all_faults_of_all_specs_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve and more broken specs: exact lines, exit 2, no file made."""
    shutil.copytree(BROKEN, tmp_path / "tests" / "broken")
    shutil.copytree(PROJECT / "specs", tmp_path / "specs")
    specs = sorted((tmp_path / "tests" / "broken").glob("*.toml"))
    assert len(specs) >= 12
    house = House.__new__(House)
    house.folder = tmp_path / "tests"
    before = sorted(tmp_path.rglob("*"))
    said = house.fluxrun("queue", "broken")
    assert said.code == 2
    assert said.out == ""
    assert said.err.splitlines() == (BROKEN / "expected.txt").read_text().splitlines()
    assert {spec.name for spec in specs} == {
        line.split(":")[0].removeprefix("broken/") for line in said.err.splitlines()[:-1]
    }
    assert sorted(tmp_path.rglob("*")) == before


def one(tmp_path: Path, text: str) -> Spec:
    path = tmp_path / "one.toml"
    path.write_text(text)
    [loaded] = load([path])
    return loaded.spec


def faults(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "one.toml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load([path])
    return [str(fault).removeprefix(f"{tmp_path}/") for fault in caught.value.faults]


VALUES = {  # every key of the contract, with a value that is not its default
    "name": '"other"',
    "seed": "7",
    "model.revision": '"main"',
    "model.variant": '"fp16"',
    "model.dtype": '"bf16"',
    "model.quantize": '"nf4"',
    "model.gradient_checkpointing": "3",
    "model.offload": '"blocks"',
    "model.attention": '"flash"',
    "model.compile": "true",
    "model.tf32": "false",
    "model.max_sequence_length": "128",
    "data.config": '"small"',
    "data.split": '"test"',
    "data.image_column": '"img"',
    "data.caption_column": '"text"',
    "data.prompt": '"a thing"',
    "data.repeats": "3",
    "data.resolution": "[512, 768]",
    "data.buckets": "true",
    "data.center_crop": "true",
    "data.random_flip": "true",
    "data.interpolation": '"bicubic"',
    "data.variants": "2",
    "data.caption_dropout": "0.1",
    "data.holdout": "2",
    "data.workers": "4",
    "prior": '{ images = "y", prompt = "a dog", count = 5, weight = 0.5, dtype = "bf16", batch_size = 2 }',
    "tokens": '[{ name = "TOK", vectors = 4, initializer = "red dog" }]',
    "inversion.encoders": '["clip", "t5"]',
    "inversion.until": "0.25",
    "inversion.lr": "0.01",
    "inversion.weight_decay": "0.5",
    "inversion.pooling": '"eos"',
    "inversion.gradient_checkpointing": '"selective"',
    "lora.rank": "4",
    "lora.alpha": "8",
    "lora.dropout": "0.1",
    "lora.layers": '["attn.to_q"]',
    "lora.until": "0.5",
    "text_lora": "{ rank = 4, alpha = 8.0, until = 0.5, lr = 0.1 }",
    "train.steps": "11",
    "train.batch_size": "2",
    "train.accumulate": "2",
    "train.lr": "0.5",
    "train.scale_lr": "true",
    "train.guidance": "1",
    "train.max_grad_norm": "2",
    "train.weighting": '{ scheme = "logit_normal", mean = 0.5, std = 2.0 }',
    "optimizer": '{ name = "prodigy", d_coef = 2.0, beta3 = 0.9, growth_rate = 1.02 }',
    "schedule": '{ name = "polynomial", warmup = 3, power = 2.0 }',
    "checkpoint.every": "5",
    "checkpoint.minutes": "0.5",
    "checkpoint.keep": "1",
    "validate": '{ prompts = ["a"], every = 5, count = 2, steps = 4, size = 64, loss = true }',
    "stop": "{ no_better_for = 10, loss_above = 2.0, at = 0.5 }",
    "export.best": "true",
    "track.to": '["wandb"]',
    "export.dtype": '"fp16"',
    "hub.push": "true",
    "hub.repo": '"me/it"',
    "hub.private": "true",
    "notify.url": '"$HOOK"',
    "notify.command": '"true"',
    "compute.gpus": "2",
}


@pytest.mark.parametrize("key", VALUES)
def test_every_key_of_the_contract_is_read(tmp_path: Path, key: str) -> None:
    tables = tomllib.loads(LEAST)
    value = tomllib.loads(f"v = {VALUES[key]}")["v"]
    *folders, last = key.split(".")
    table = tables
    for folder in folders:
        table = table.setdefault(folder, {})
    table[last] = value
    if key.startswith("inversion"):
        tables["tokens"] = [{"name": "TOK"}]
    if key in ("stop", "export.best"):
        tables["validate"] = {"every": 5}
    if key == "hub.push":
        table["repo"] = "me/it"
    found = dump(one(tmp_path, tomli_w.dumps(tables)))
    for folder in folders:
        found = found[folder]
    got = found[last]
    if isinstance(value, dict):
        assert value.items() <= got.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        assert value[0].items() <= got[0].items()
    else:
        assert got == value


def test_every_key_is_in_the_table() -> None:
    keys = {name for name, about in spec_keys().items() if not about.is_table}
    covered = {name for name in keys if any(name == key or name.startswith(f"{key}.") for key in VALUES)}
    assert keys - covered == {"model.base", "data.source", "train.epochs"}


def test_defaults_are_the_contracts(tmp_path: Path) -> None:
    spec = one(tmp_path, LEAST)
    assert (spec.name, spec.seed, spec.model.max_sequence_length, spec.data.resolution) == ("one", 0, 512, 512)
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.layers, spec.train.lr) == (16, 16.0, "attention", 1e-4)
    assert (spec.train.guidance, spec.checkpoint.every, spec.checkpoint.keep, spec.validation.size) == (
        3.5,
        100,
        2,
        512,
    )
    assert one(tmp_path, LEAST + '[optimizer]\nname = "prodigy"\n').train.lr == 1.0
    tokens = LEAST + '[[tokens]]\nname = "TOK"\n'
    assert one(tmp_path, tokens).inversion.until == 0.5
    assert one(tmp_path, tokens + "[lora]\nuntil = 0\n").inversion.until == 1.0


def test_the_resolved_spec_reads_back_as_itself(tmp_path: Path) -> None:
    spec = one(tmp_path, LEAST + '[[tokens]]\nname = "TOK"\n[optimizer]\nname = "prodigy"\n')
    assert one(tmp_path, tomli_w.dumps(dump(spec))) == spec


def test_a_sweep_is_the_product_of_its_lists(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(LEAST + '[sweep]\n"lora.rank" = [4, 8]\n"train.lr" = [1e-4, 1e-3]\n')
    specs = [loaded.spec for loaded in load([path])]
    assert [spec.name for spec in specs] == [
        "s/lora.rank=4,train.lr=0.0001",
        "s/lora.rank=4,train.lr=0.001",
        "s/lora.rank=8,train.lr=0.0001",
        "s/lora.rank=8,train.lr=0.001",
    ]
    assert [(spec.lora.rank, spec.lora.alpha, spec.train.lr) for spec in specs][2] == (8, 8.0, 1e-4)


def test_two_specs_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text('name = "same"\n' + LEAST)
    with pytest.raises(SpecError, match="b.toml:1: name: expected a different name for each run"):
        load([tmp_path])


@pytest.mark.parametrize("name", ["../out", "/root", "a/../../b", ".hidden", "a b", "", "x\u0000"])
def test_a_name_cannot_leave_the_runs_folder(tmp_path: Path, name: str) -> None:
    assert any(": name: " in fault for fault in faults(tmp_path, tomli_w.dumps({"name": name}) + LEAST))


def test_hostile_text_is_a_fault_not_a_traceback(tmp_path: Path) -> None:
    assert faults(tmp_path, "a = " + "[" * 2000 + "]" * 2000) == ["one.toml:1: not a spec: nested too deeply"]
    [long] = [fault for fault in faults(tmp_path, "rank = " + "9" * 3000 + "\n" + LEAST) if ": rank:" in fault]
    assert len(long) < 400
    [control] = [fault for fault in faults(tmp_path, '"a\\u001bb" = 1\n' + LEAST) if "unknown" in fault]
    assert "\x1b" not in control


def test_wrong_tables_and_lists_are_explained_in_toml_words(tmp_path: Path) -> None:
    text = LEAST + 'weighting = "mode"\n[validate]\nprompts = "a TOK"\n[[token]]\nname = "TOK"\n'
    told = faults(tmp_path, text)
    assert told[0] == (
        "one.toml:7: train.weighting: expected a table, got 'mode'; write [train.weighting], and below it scheme = \"mode\" "
        "(how the timesteps are drawn and weighted)"
    )
    assert told[1].startswith("one.toml:9: validate.prompts: expected a list of text, got 'a TOK'; write prompts = [")
    assert told[2].startswith("one.toml:10: token: unknown table, got token = ")
    assert told[2].endswith("did you mean [[tokens]]?")


def test_lines_of_keys_in_tricky_toml() -> None:
    text = '''# comment = 1
a = """
b = 2
[c]
"""
"d.e" = [
  1, # ]
  "]",
]
[t]
x.y = { z = 1 }
[[u]]
n = 1
[[u]]
n = 2
[u.v]
w = '[['
'''
    tomllib.loads(text)
    lines = key_lines(text)
    wanted = {
        ("a",): 2,
        ("d.e",): 6,
        ("t",): 10,
        ("t", "x", "y"): 11,
        ("u",): 12,
        ("u", 0, "n"): 13,
        ("u", 1, "n"): 15,
        ("u", 1, "v", "w"): 17,
    }
    assert {path: lines[path] for path in wanted} == wanted
    assert ("b",) not in lines
    assert line_of(lines, ("t", "x", "y", "z")) == 11
    assert line_of(lines, ("nowhere",)) == 1


def test_light_commands_import_nothing_heavy(tmp_path: Path) -> None:
    """`--help`, `plan`, `status` and `results` start at once because of this."""
    heavy = {"torch", "diffusers", "transformers", "peft", "datasets", "tensorboard"}
    readers = [
        [*words, "--runs", str(tmp_path)] for words in (["status"], ["results"], ["results", "--csv"], ["report"])
    ]
    for arguments in (["--help"], ["plan", "specs"], *readers):
        code = (
            "import sys\nfrom click.testing import CliRunner\nfrom runner.cli import main\n"
            f"result = CliRunner().invoke(main, {arguments!r})\nassert result.exit_code == 0, result.output\n"
            f"print(sorted({heavy!r} & set(sys.modules)))"
        )
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == "[]\n", arguments


def test_help_and_plan_are_fast() -> None:
    """In seconds of the processor, which a busy machine does not stretch: 0.3 for `--help`, 1 for all shipped specs'
    plan."""
    for arguments, most in ((["--help"], 0.3), (["plan", *map(str, sorted((PROJECT / "specs").glob("*.toml")))], 1.0)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "runner", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        subprocess.run(command, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < most, arguments


def test_the_schema_names_the_keys() -> None:
    schema = json_schema()
    assert {"model", "data", "tokens", "validate", "sweep", "optimizer"} <= schema["properties"].keys()
    assert schema["then"]["required"] == ["model", "data", "train"]
