"""`fluxrun compare`."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.support.house import House
from tests.support.run_folders import write_run


def test_compare_two_runs(night: House) -> None:
    said = night.fluxrun("compare", "b", "a", "--out", "sheet.png")
    assert said.code == 0, said.err
    lines = [line.split() for line in said.out.splitlines()]
    assert ["lora.rank", "8", "4"] in lines
    assert ["eval", "loss", "0.3000", "*", "0.5000"] in lines
    [sigma] = [line for line in lines if line[:1] == ["0.3"]]
    assert sigma == ["0.3", "0.2473", "0.4073", "+64.7", "%"]
    assert "a is below b at 0 of 9 noise levels" in said.out
    assert "do not compare" not in said.out
    with Image.open(night.folder / "sheet.png") as sheet:
        assert sheet.size == (2 * 200 + 8, 22 + 2 * 222)  # two runs wide, two prompts high
        left, right = sheet.getpixel((100, 100)), sheet.getpixel((300, 100))
    assert (left, right) == ((30, 255, 240), (30, 255, 120))  # rank is their blue


def test_compare_as_json_tells_when_losses_do_not_compare(night: House) -> None:
    spec = night.folder / "runs" / "c" / "spec.toml"
    spec.write_text(spec.read_text().replace("holdout = 2", "holdout = 1"))
    found = json.loads(night.fluxrun("compare", "a", "b", "c", "--json").out)
    assert found["runs"] == ["a", "b", "c"]
    assert found["differing"]["data.holdout"] == [2, 2, 1]
    assert found["comparable"] is False
    assert found["by_sigma"]["0.5"] == pytest.approx([0.509, 0.309, 0.409], abs=0.002)
    assert "these eval losses do not compare" in night.fluxrun("compare", "a", "c").out


def test_compare_refuses_what_it_cannot(night: House) -> None:
    assert night.fluxrun("compare", "a", "x", "y").err == (
        "fluxrun: no such run in runs: x, y; `fluxrun results` lists them\n"
    )
    assert "comparing takes two runs or more (found a)" in night.fluxrun("compare", "a", "a").err
    write_run(night.folder / "runs", "other", prompts=["another"])
    assert "share no picture" in night.fluxrun("compare", "a", "other", "--out", "x.png").err
