"""A run folder's own spec.toml is a spec: queueing it, as the results page says for a run that failed, goes on with the
same run. Also where an earlier fluxrun wrote it, and whatever the run trains."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.jobs.job import Job
from runner.jobs.prepare import prepare_jobs
from runner.runs.claim import claim_run
from runner.runs.run import find_runs
from tests.support.command_lines import refusal
from tests.support.house import House
from tests.support.paths import OLD_RUNS
from tests.support.runs import stopping_after

WHOLE = """
[model]
base = "builtin:tiny"
max_sequence_length = 32
[data]
source = "pictures"
resolution = 64
[train]
steps = 8
"""
TOKEN = '[[tokens]]\nname = "TOK"\n'
KINDS = {  # what is laid over WHOLE
    "lora": "",
    "pivotal": TOKEN,
    "pivotal-t5": f'{TOKEN}initializer = "creature"\nplaceholder = "bird"\n'
    '[inversion]\nencoders = ["clip", "t5"]\nlr = 1e-3\npooling = "both"\n',
    "inversion": f"{TOKEN}[lora]\nuntil = 0.0\n",
    "text-lora": "[text_lora]\nrank = 2\n",
    "text-lora-alone": "[text_lora]\nuntil = 0.5\n[lora]\nuntil = 0.0\n",
    "prior": '[prior]\nimages = "classes"\nprompt = "a circle"\ncount = 2\n',
    "prodigy": '[optimizer]\nname = "prodigy"\n',
    "prodigy-pivotal": f'{TOKEN}[optimizer]\nname = "prodigy"\nd_coef = 2.0\n',
    "prodigy-text-lora": '[text_lora]\nrank = 2\n[optimizer]\nname = "prodigy"\n',
    "adamw8bit": '[optimizer]\nname = "adamw8bit"\n',
    "cosine": '[schedule]\nname = "cosine_with_restarts"\nwarmup = 2\ncycles = 2\n',
    "weighting": '[train]\nweighting = {scheme = "logit_normal", mean = 0.5}\n',
    "mode": '[train]\nweighting = {scheme = "mode", scale = 1.0}\n',
    "buckets": "[data]\nbuckets = true\nresolution = [48, 64]\nholdout = 2\ncaption_dropout = 0.1\n",
    "stop": "[validate]\nevery = 2\n[stop]\nno_better_for = 4\nat = 0.1\n[export]\nbest = true\n",
    "selective": '[model]\ngradient_checkpointing = "selective"\n',
    "offload": '[model]\noffload = "blocks"\nquantize = "nf4"\n',
    "every-other": f'{TOKEN}[model]\ngradient_checkpointing = 2\n[inversion]\ngradient_checkpointing = "selective"\n',
    "compiled": "[model]\ncompile = true\n",
    "layers": '[lora]\nlayers = ["attn.to_q", "ff.net.0.proj"]\nalpha = 4.0\ndropout = 0.1\n',
    "told": '[notify]\nurl = "$HOOK"\ncommand = "notify-send"\n[validate]\nprompts = ["it\'s a \\"circle\\"  # set in red"]\n',
    "sweep": '[sweep]\n"lora.rank" = [2, 4]\n"train.lr" = [1e-3]\n',
    "prodigy-sweep": '[optimizer]\nname = "prodigy"\n[sweep]\n"train.lr" = [0.5, 1.0]\n',
    "token-sweep": f'{TOKEN}[sweep]\n"inversion.until" = [0.25, 1.0]\n',
}


def claimed(house: House, *specs: Path, runs: Path = Path("runs")) -> list[Job]:
    """What `queue` does before anything trains: the run folders are there, with their resolved specs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(house.folder)
        jobs = prepare_jobs(specs, runs, fetch=True, fresh=False)
        for job in jobs:
            claim_run(job.run, job.spec, job.plan, "0.1.0", job.source.origin)
            job.run.release()
    return jobs


def written(house: House) -> list[Path]:
    house.write("whole.toml", WHOLE)
    night = house.folder / "night"
    night.mkdir(exist_ok=True)
    for name, more in KINDS.items():
        (night / f"{name}.toml").write_text(f'extends = "../whole.toml"\n{more}')
    house.write("epochs.toml", WHOLE.replace("steps = 8", "epochs = 2"))
    return [Path("epochs.toml"), *(Path("night", f"{name}.toml") for name in KINDS)]


@pytest.fixture
def night(house: House) -> House:
    claimed(house, *written(house))
    return house


def contents(runs: Path) -> Iterator[tuple[str, str, object]]:
    """Of each run: its name, its spec.toml, and the keys of its phases and of the plan."""
    for run in find_runs(runs):
        plan = json.loads(run.plan_file.read_text())
        yield run.name, run.spec_file.read_text(), (plan["key"], plan["training_key"], plan["phases"])


def test_a_runs_own_spec_is_the_same_run(night: House) -> None:
    """Same name, same keys, and its spec.toml goes on telling where each value first came from."""
    runs = night.folder / "runs"
    before = list(contents(runs))
    assert len(before) == 1 + len(KINDS) + 3  # of three sweeps the other runs
    said = night.fluxrun("plan", *sorted(runs.glob("**/spec.toml")), "--json")
    planned = json.loads(said.out)
    assert planned["errors"] == []
    assert sorted(run["name"] for run in planned["runs"]) == sorted(name for name, *_ in before)
    assert {run["reason"] for run in planned["runs"]} == {"no checkpoint yet"}
    claimed(night, *(Path("runs", name, "spec.toml") for name, *_ in before))
    assert list(contents(runs)) == before
    swept = [text for name, text, _ in before if name.startswith("sweep/")]
    assert sorted(re.findall(r"^rank = (\d)  # sweep in night/sweep.toml$", "".join(swept), re.M)) == ["2", "4"]


def test_what_is_changed_in_a_runs_own_spec_is_set_there(night: House) -> None:
    spec = night.folder / "runs" / "lora" / "spec.toml"
    text = spec.read_text()
    assert "\nseed = 0  # default\n" in text
    assert "\nrank = 16  # default\nalpha = 16.0  # default\n" in text
    text = text.replace("\nalpha = 16.0  # default\n", "\n").replace("keep = 2  # default", "keep = 5")
    spec.write_text(text)
    claimed(night, Path("runs/lora/spec.toml"))
    again = spec.read_text()
    assert "\nalpha = 16.0  # default\n" in again  # every key, whatever was taken out
    assert "keep = 5  # set in runs/lora/spec.toml\n" in again
    assert "steps = 8  # extended from whole.toml\n" in again


def test_a_run_folder_of_an_earlier_format(tmp_path: Path) -> None:
    house = House.__new__(House)
    house.folder = tmp_path
    shutil.copytree(OLD_RUNS / "v1", tmp_path, dirs_exist_ok=True)
    (tmp_path / "night").rename(tmp_path / "runs")
    for spec in tmp_path.glob("runs/*/spec.toml"):  # made elsewhere
        spec.write_text(
            re.sub(r'^source = ".*/pictures"', f'source = "{tmp_path}/pictures"', spec.read_text(), flags=re.M)
        )
    said = house.fluxrun("plan", "runs/half/spec.toml", "runs/whole/spec.toml")
    assert said.code == 0, said.err
    assert "half  (runs/half/spec.toml)  resume: interrupted; last checkpoint at step 2 of 4\n" in said.out
    assert "whole  (runs/whole/spec.toml)  done: " in said.out


def test_a_copy_of_a_resolved_spec_is_a_spec(night: House) -> None:
    """As a beginning of the next one: a LoRA alone has an [inversion] there, filled in, which stands in nobody's
    way."""
    text = (night.folder / "runs" / "lora" / "spec.toml").read_text()
    assert tomllib.loads(text)["inversion"] == {
        "encoders": ["clip"], "until": 0.5, "lr": 1e-4, "weight_decay": 1e-3, "pooling": "diffusers",
    }  # fmt: skip
    copy = text.replace('name = "lora"', 'name = "next"', 1)
    before, train, after = copy.partition("[train]")
    night.write("next.toml", before + train + after.replace("lr = 0.0001 ", "lr = 0.0004 ", 1))
    said = night.fluxrun("plan", "next.toml")
    assert (said.code, said.err) == (0, "")
    night.write("next.toml", copy.replace('pooling = "diffusers"', 'pooling = "eos"'))
    said = night.fluxrun("plan", "next.toml")
    assert said.code == 2
    assert re.search(r"^next.toml:\d+: inversion: there are no tokens to learn; ", said.err), said.err
    night.write("next.toml", copy[: copy.index("[fluxrun]")])  # somebody's own, then
    assert "inversion: there are no tokens to learn" in night.fluxrun("plan", "next.toml").err


# ---- the page ------------------------------------------------------------------------------------------------------


def page_commands(runs: Path) -> list[str]:
    """What the page has to be copied, as a reader sees it."""
    page = (runs / "index.html").read_text()
    return [html.unescape(found) for found in re.findall(r"<code>(fluxrun .*?)</code>", page)]


@pytest.mark.parametrize("runs", ["runs", "my runs/to-night"])
def test_what_the_page_says_to_type_goes_on(house: House, runs: str) -> None:
    """Typed where fluxrun was, each goes on with its run: nothing new appears."""
    where = [] if runs == "runs" else ["--runs", runs]
    claimed(house, *written(house), runs=Path(runs))
    before = sorted(run.name for run in find_runs(house.folder / runs))
    assert house.fluxrun("report", *where).code == 0
    commands = [shlex.split(line)[1:] for line in page_commands(house.folder / runs)]
    queued = [words for words in commands if words[0] == "queue"]
    assert sorted({words[1] for words in queued}) == sorted(f"{runs}/{name}/spec.toml" for name in before)
    for words in commands:
        assert (wrong := refusal(words, house.folder)) is None, f"{words}: {wrong}"
        assert words[-2:] == where if where else "--runs" not in words
    said = house.fluxrun("queue", *{words[1] for words in queued}, *where, "--dry-run", "--json")
    planned = json.loads(said.out)
    assert planned["errors"] == []
    assert sorted((run["name"], run["state"]) for run in planned["runs"]) == [(name, "resume") for name in before]
    [told] = {tuple(words) for words in queued if words[1] == f"{runs}/told/spec.toml"}
    assert "--allow-commands" in told


def test_a_run_that_was_stopped_goes_on_by_its_own_spec(house: House) -> None:
    """A LoRA alone, whose resolved spec was refused once; typed as the page has it."""
    house.write(
        "a.toml", WHOLE.replace("steps = 8", "steps = 3") + "[checkpoint]\nevery = 1\n[validate]\nloss = false\n"
    )
    with stopping_after(2):
        assert house.fluxrun("queue", "a.toml").code == 3
    before = (house.folder / "runs" / "a" / "spec.toml").read_text()
    [line] = {line for line in page_commands(house.folder / "runs") if line.startswith("fluxrun queue")}
    assert line == "fluxrun queue runs/a/spec.toml"
    said = house.fluxrun(*shlex.split(line)[1:])
    assert said.code == 0, said.err
    assert "a: resuming at step 2 of 3\n" in said.err
    assert (house.folder / "runs" / "a" / "spec.toml").read_text() == before
    assert [run.name for run in find_runs(house.folder / "runs")] == ["a"]
    assert (
        "a: skipped, done (same spec, data and base; its exports are there)\n" in house.fluxrun("queue", "a.toml").err
    )


def test_a_folder_moved_aside_has_no_commands(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """By --fresh: its spec is that of the run which has the name now."""
    [job] = claimed(house, house.spec("a"))
    monkeypatch.chdir(house.folder)
    assert job.run.archive() == Path("runs/a.old-1")
    house.fluxrun("report")
    assert set(page_commands(house.folder / "runs")) == {"fluxrun board"}


def test_the_runs_folder_is_named_where_a_command_would_take_another(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("runs", "other night", "elsewhere"):
        (house.folder / folder).mkdir()
    said = house.fluxrun("export", "nothing", "--runs", "other night")
    assert said.err == (
        "fluxrun: other night/nothing: no such run; `fluxrun status --runs 'other night'` lists the runs there are\n"
    )
    assert house.fluxrun("sample", "nothing").err == (
        "fluxrun: runs/nothing/export: no exports; `fluxrun status` shows how far the run is\n"
    )
    monkeypatch.setenv("FLUXRUN_RUNS", "elsewhere")
    said = house.fluxrun("stop", "nothing", "--runs", "runs")
    assert "`fluxrun status --runs runs` shows what each run is doing" in said.err
