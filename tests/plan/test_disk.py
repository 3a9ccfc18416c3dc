"""What a night is said to write, held against what it left; one formula for plan, check and queue."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from runner.core import files
from runner.core.humanize import format_bytes
from runner.jobs.disk_need import queue_bytes
from runner.jobs.prepare import prepare_jobs
from runner.plan import disk
from tests.support.house import House

MOST = 2  # times what a run leaves: the factor of runner/plan/disk.py


def planned(house: House, *specs: Path) -> list[int]:
    said = house.fluxrun("plan", *specs, "--json")
    return [one["disk_bytes"] for one in json.loads(said.out)["runs"]]


def notes(house: House, *words: str | Path) -> list[str]:
    found = json.loads(house.fluxrun("check", *words, "--json").out)["findings"]
    return [one["message"] for one in found if one["message"].startswith("disk: ")]


def test_the_estimate_is_not_below_what_a_run_leaves_and_not_far_above(done: House) -> None:
    folder = done.folder / "runs" / "a"
    left = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert left > 500_000
    [wanted] = planned(done, Path("a.toml"))
    assert left <= wanted <= MOST * left


def test_what_goes_into_the_cache(done: House) -> None:
    left = disk.bytes_in(done.folder / "runs" / "cache")
    jobs = prepare_jobs([done.folder / "a.toml"], done.folder / "other-runs", fetch=False, fresh=False)
    _, cached = queue_bytes(jobs, on_gpu=False)
    assert left <= cached <= MOST * left


def test_looks_and_steps_are_counted(house: House) -> None:
    plain = house.spec("plain")
    looking = house.spec("looking", prompts='prompts = ["a TOK", "a TOK on snow"]\nevery = 2\ncount = 3')
    long = house.spec("long", steps="steps = 60")
    few, more, longer = planned(house, plain, looking, long)
    picture = 3 * 64 * 64  # bytes of RGB
    assert more - few == (2 * 3 * (2 * 3 + 6) - 6) * picture  # three looks, each in samples/ and in the events
    assert longer - few == 54 * disk.BYTES_PER_STEP


def test_a_base_that_is_not_here_is_taken_for_flux_1(house: House) -> None:
    known = house.spec("known", base='base = "black-forest-labs/FLUX.1-dev"')
    unknown = house.spec("unknown", base='base = "some/finetune"')
    of_known, of_unknown = planned(house, known, unknown)
    assert of_known == of_unknown > 2**27


def test_plan_check_and_queue_say_the_same(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = house.spec()
    [note] = notes(house, spec)
    assert "16 MiB more must stay free" in note

    [wanted] = planned(house, spec)
    usage = type(shutil.disk_usage(house.folder))
    free = wanted + disk.SPARE  # for the run alone, not for what goes into the cache
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, free))
    [error] = notes(house, spec)
    assert error.startswith("disk: the runs need about ")
    assert f"({format_bytes(wanted)} in 1 run folder, " in error
    assert "16 MiB that must stay free), and runs has room for" in error

    monkeypatch.setattr(type(files.DISK), "free", lambda *_: wanted + disk.SPARE // 2)
    said = house.fluxrun("queue", spec, "--no-check")
    assert said.code == 3
    assert (
        f"a: paused: the run needs about {format_bytes(free)}, of which 16 MiB must stay free, and runs/a has room for"
        in said.err
    )


def test_quantised_weights_are_kept_in_the_cache(house: House) -> None:
    def cached(spec: Path) -> float:
        [note] = notes(house, spec)
        number, unit = note.removeprefix("disk: about ").split()[:2]
        return float(number) * {"MiB": 2**20, "GiB": 2**30}[unit]

    here = 'base = "black-forest-labs/FLUX.1-dev"'
    plain, small = house.spec("plain", base=here), house.spec("small", base=f'{here}\nquantize = "int8"')
    assert (
        15 * 2**30 < cached(small) - cached(plain) < 18 * 2**30
    )  # 11.9e9 + 4.7e9 numbers of a byte, and what is no matrix
