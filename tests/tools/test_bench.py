"""That each benchmark's command runs, on the bundled base and as short as can be; what it measures is no test's
business."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.support.paths import PROJECT

BENCH, TINY = PROJECT / "tools" / "bench", PROJECT / "runner" / "bases" / "tiny"
REFERENCE = """
import sys, pathlib
if "--help" not in sys.argv:
    out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
    out.mkdir()
    (out / "pytorch_lora_weights.safetensors").touch()
"""
SMALL = ["--model", str(TINY), "--rounds", "1"]


def typed(monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(BENCH / name), run_name="__main__")


def rows(text: str) -> list[list[str]]:
    """Of the table at the end, without its heading."""
    found = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]
    assert len(found) > 2, text
    assert len({len(row) for row in found}) == 1, text
    return found[2:]


def test_a_step_is_compared_at_equal_shapes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--bases", "tiny", "--rounds", "1", "--steps", "2", "--phases", "clip+t5", "--optimizers", "adamw")
    typed(monkeypatch, "step.py", *words)
    assert [row[:3] for row in rows(capsys.readouterr().out)] == [["tiny", "clip+t5", "adamw"]]


def test_a_bare_loop_runs_by_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--steps",
        "2",
        "--resolution",
        "64",
        "--tokens",
        "32",
        "--encoders",
        "clip",
        "t5",
        "--optimizer",
        "prodigy",
    )
    typed(monkeypatch, "bare.py", str(TINY), *words)
    assert "numbers trained" in capsys.readouterr().out


@pytest.mark.slow
def test_a_save_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "startup.py", "--bases", "tiny", "--rounds", "1", "--parts", "checkpoint")
    assert "a save of" in rows(capsys.readouterr().out)[0][1]


@pytest.mark.slow
def test_starts_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "startup.py", "--bases", "tiny", "--rounds", "1", "--parts", "commands", "queue", "resume")
    assert len(rows(capsys.readouterr().out)) == 8


@pytest.mark.slow
def test_the_last_phase_is_watched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "lora_memory.py", *SMALL, "--steps", "10")
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["pivotal CLIP+T5", "frozen encoders"]


@pytest.mark.slow
def test_growth_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "growth.py", *SMALL, "--vary", "captions", "specs", "--few")
    assert [row[:2] for row in rows(capsys.readouterr().out)] == [
        ["captions", "1"], ["captions", "10"], ["specs", "1"], ["specs", "2"],
    ]  # fmt: skip


@pytest.mark.slow
def test_a_reference_is_run_beside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One that trains nothing: whether the real one still takes these arguments only `just bench-reference` tells."""
    (tmp_path / "script.py").write_text(REFERENCE)
    small = [*SMALL, "--steps", "2", "--resolution", "64", "--tokens", "32", "--cases", "captions", "four-short"]
    typed(monkeypatch, "against_reference.py", "--script", str(tmp_path / "script.py"), *small)
    assert [row[:2] for row in rows(capsys.readouterr().out)] == [["captions", "1 x 2"], ["four-short", "4 x 2"]]
