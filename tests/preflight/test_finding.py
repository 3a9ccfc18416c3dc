"""What many specs have in common is said once, with where else it stands."""

from __future__ import annotations

import json

from tests.support.house import House


def test_what_all_specs_of_a_night_have_is_told_once(house: House) -> None:
    (house.folder / "pictures" / "03.png").write_text("no picture")
    specs = [house.spec(f"run{number:03}") for number in range(30)]
    said = house.fluxrun("check", *specs)
    assert said.code == 2
    lines = said.out.splitlines()
    [at] = [number for number, line in enumerate(lines) if "not a readable image" in line]
    assert lines[at].startswith(f"error: {specs[0]}:5: data.source: ")
    shown = ", ".join(f"{spec}:5" for spec in specs[1:6])
    assert lines[at + 1] == f"    the same in 29 more places: {shown}, ..."
    assert lines[-1] == "30 runs: 1 error, 0 warnings, 3 notes"
    assert len(lines) < 10

    document = json.loads(house.fluxrun("check", *specs, "--json").out)
    assert document["counts"]["error"] == 1
    assert document["findings"][0]["also"] == [{"file": str(spec), "line": 5} for spec in specs[1:]]
    queued = house.fluxrun("queue", *specs)
    assert queued.code == 2
    assert queued.err.count("not a readable image") == 1


def test_two_specs_with_one_fault_each(house: House) -> None:
    """A few faults are a line each, which an editor jumps to; many are one."""
    few = [house.spec(f"run{number}", steps="steps = 0") for number in range(3)]
    said = house.fluxrun("queue", *few)
    assert [line.split(": ")[:2] for line in said.err.splitlines()[:-1]] == [
        [f"{spec}:16", "train.steps"] for spec in few
    ]
    more = house.spec("run3", steps="steps = 0")
    said = house.fluxrun("queue", *few, more)
    first, same, end = said.err.splitlines()
    assert first.startswith(f"{few[0]}:16: train.steps: ")
    assert same == f"    the same in 3 more places: {few[1]}:16, {few[2]}:16, {more}:16"
    assert end == "4 faults; nothing was started"
