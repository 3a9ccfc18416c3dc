"""A longer run goes on from the shorter one where that gives the same bytes, and is refused, with the reason, where
not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.broken_runs import assert_same, go_on, lora, state, unbroken
from tests.support.house import House
from tests.support.runs import export_bytes, stopping_after

INVERSION = {"rank": "rank = 4\nuntil = 0", "encoders": 'encoders = ["clip"]', "prompts": "prompts = []"}
PIVOTAL = {"rank": "rank = 4", "encoders": 'encoders = ["clip"]', "prompts": "prompts = []"}


def spec_of(house: House, kind: str, steps: int, until: float = 0.5, schedule: str = "") -> Path:
    if kind == "lora":
        spec = lora(house, steps=f"steps = {steps}")
    elif kind == "inversion":
        spec = house.spec("a", steps=f"steps = {steps}", **INVERSION)
    else:
        spec = house.spec("a", steps=f"steps = {steps}", **PIVOTAL)
        spec.write_text(spec.read_text().replace("lr = 1e-2", f"lr = 1e-2\nuntil = {until}"))
    if schedule:
        spec.write_text(spec.read_text() + f'[schedule]\nname = "{schedule}"\n')
    return spec


@pytest.mark.parametrize(("kind", "until"), [("lora", (1, 1)), ("inversion", (1, 1)), ("pivotal", (0.5, 0.25))])
def test_more_steps_give_the_bytes_of_the_longer_run(house: House, kind: str, until: tuple[float, float]) -> None:
    """From a done run. Where there is a pivot, `until` is set so that it stays."""
    go_on(house, spec_of(house, kind, 4, until[0]))
    short = export_bytes(house.folder / "runs" / "a")
    longer = spec_of(house, kind, 8, until[1])
    plan = house.fluxrun("plan", longer)
    assert plan.code == 0
    changed = ("inversion.until: 0.5 -> 0.25; " if kind == "pivotal" else "") + "train.steps: 4 -> 8"
    assert f"resume: {changed}; goes on from step 4 of 8" in plan.out
    said = go_on(house, longer)
    assert "a: resuming at step 4 of 8\n" in said.err
    assert (state(house)["state"], state(house)["step"], state(house)["steps"]) == ("done", 8, 8)
    unbroken(house, longer)
    assert_same(house)
    assert export_bytes(house.folder / "runs" / "a") != short


@pytest.mark.slow
def test_twice_longer_and_stopped_on_the_way(house: House) -> None:
    with stopping_after(1):
        assert house.fluxrun("queue", spec_of(house, "lora", 4)).code == 3
    with stopping_after(3):
        assert house.fluxrun("queue", spec_of(house, "lora", 6)).code == 3
    last = spec_of(house, "lora", 5)  # less again, but more than is trained
    go_on(house, last)
    unbroken(house, last)
    assert_same(house)


@pytest.mark.slow
def test_control_a_schedule_that_asks_how_long_the_run_is_would_differ(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal of cosine is needed: let through, it ends with other bytes."""
    from runner.plan import keys

    monkeypatch.setattr(keys, "OPEN_ENDED", ("constant", "cosine"))
    go_on(house, spec_of(house, "lora", 4, schedule="cosine"))
    longer = spec_of(house, "lora", 8, schedule="cosine")
    go_on(house, longer)
    unbroken(house, longer)
    with pytest.raises(AssertionError, match="other bytes in .*pytorch_lora_weights"):
        assert_same(house)


REFUSED = {
    "the pivot would move": (
        ("pivotal", 4, 0.5, ""), ("pivotal", 8, 0.5, ""),
        "train.steps: 4 -> 8; it is at step 4 already; a phase of it ended at step 2, and would now end at step 4; set "
        "inversion.until = 0.25, with which it goes on",
    ),
    "a schedule with an end": (
        ("lora", 4, 1, "cosine"), ("lora", 8, 1, "cosine"),
        "train.steps: 4 -> 8; the cosine schedule depends on where it ends",
    ),
    "less than is trained": (
        ("lora", 4, 1, ""), ("lora", 2, 1, ""),
        "train.steps: 4 -> 2; it is at step 4 already, and this phase would now end at step 2; set train.steps = 4, with which "
        "it goes on",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_the_longer_run_is_refused(house: House, case: str) -> None:
    old, new, reason = REFUSED[case]
    go_on(house, spec_of(house, *old))
    before = export_bytes(house.folder / "runs" / "a")
    said = house.fluxrun("queue", spec_of(house, *new))
    assert said.code == 2
    assert (
        f"name: runs/a holds another run: {reason}; give this spec another `name`, undo the change, or queue it with --fresh"
        in (said.err)
    )
    assert export_bytes(house.folder / "runs" / "a") == before


def test_what_does_not_change_the_result_may_change_on_the_way(house: House) -> None:
    spec = lora(house)
    unbroken(house, spec)
    with stopping_after(1):
        assert house.fluxrun("queue", spec).code == 3
    changed = lora(
        house,
        every="every = 1\nkeep = 1\nminutes = 5",
        to='to = ["tensorboard"]',
        resolution="resolution = 64\nworkers = 2",
    )
    changed.write_text(changed.read_text() + '[validate]\nprompts = ["a thing"]\nsteps = 1\nevery = 1\n')
    said = go_on(house, changed)
    assert "a: resuming at step 1 of 4\n" in said.err
    name = "export/pytorch_lora_weights.safetensors"
    assert export_bytes(house.folder / "runs" / "a")[name] == export_bytes(house.folder / "unbroken" / "a")[name]
