"""What the queue makes of a run that fails: which kinds are tried again, from where, how often, and what the others
notice."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner.core.errors import ExitCode, NonFiniteError
from tests.support.broken_runs import assert_same, failing, go_on, index, log, lora, state, unbroken
from tests.support.house import House
from tests.support.runs import export_bytes, stopping_after

SPACING = 2.0**-15  # of exported bf16 numbers between 2**-8 and 2**-7: the same weights but for a last bit


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder of undisturbed nights, each run alone: `a` and `b`."""
    house = House(tmp_path_factory.mktemp("whole"))
    for name in ("a", "b"):
        unbroken(house, lora(house, name))
    return house.folder / "unbroken"


def ray() -> Exception:
    return RuntimeError("a cosmic ray")


def test_a_crash_is_tried_again_from_the_last_checkpoint(house: House, whole: Path) -> None:
    with failing(ray, lambda _, step, *__: step == 3, times=1):
        said = go_on(house, lora(house))
    assert "a: RuntimeError: a cosmic ray; trying again from step 2 (retry 1 of 2)\n" in said.err
    assert "a: resuming at step 2 of 4\n" in said.err
    assert state(house)["attempts"] == 2
    assert "error" not in state(house)
    assert_same(house, other=whole)


def test_control_a_resume_that_forgets_the_optimizer_is_seen(
    house: House, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.training.optimizers import Optimizer

    monkeypatch.setattr(Optimizer, "restore", lambda *_: None)
    with failing(ray, lambda _, step, *__: step == 3, times=1):
        go_on(house, lora(house))
    with pytest.raises(AssertionError, match="other bytes in .*pytorch_lora_weights"):
        assert_same(house, other=whole)


def twice() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # two of one kind may arrive as one
        os.kill(os.getpid(), number)


def test_two_signals_stop_at_once(house: House, whole: Path) -> None:
    """In the middle of a step, which is lost with those since the last save."""

    def asked(_: str, step: int, *__: int) -> bool:
        if step == 3:
            twice()
        return False

    with failing(ray, asked):
        said = house.fluxrun("queue", lora(house))
    assert said.code == 3
    reason = "stopped at once; the last checkpoint stands"
    assert said.err.endswith(f"a: {reason}\n")
    assert (state(house)["state"], state(house)["error"]) == ("stopped", reason)
    assert log(house).splitlines()[-1].endswith(reason)
    assert "a: resuming at step 2 of 4\n" in go_on(house, "a.toml").err
    assert_same(house, other=whole)


def test_two_signals_during_a_save_leave_it_whole(house: House, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.checkpoint import storage

    write = storage.write

    def asked(path: Path, made: storage.Checkpoint, **named: Any) -> None:
        time.sleep(0.2)  # so that training is back at its steps
        twice()
        time.sleep(0.3)
        write(path, made, **named)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", asked)
        assert house.fluxrun("queue", lora(house)).code == 3
    folder = house.folder / "runs" / "a"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002.safetensors"]
    assert "checkpoint at step 2" in log(house)
    assert "a: resuming at step 2 of 4\n" in go_on(house, "a.toml").err
    assert_same(house, other=whole)


def test_a_run_that_crashes_on_its_way_comes_through_as_long_as_steps_are_saved(house: House) -> None:
    spec = lora(house, every="every = 1")
    met: set[int] = set()

    def once_each(_: str, step: int, *__: int) -> bool:
        first = step not in met
        met.add(step)
        return first

    with failing(ray, once_each):
        said = house.fluxrun("queue", spec, "--retries", "4")
    assert said.code == 0, said.err
    assert state(house)["attempts"] == 5
    unbroken(house, spec)
    assert_same(house)


def test_given_up_after_the_retries(house: House) -> None:
    with failing(ray, lambda _, step, *__: step == 3) as failed:
        said = house.fluxrun("queue", lora(house), "--retries", "1")
    assert said.code == 1
    assert failed == [3, 3]
    reason = "RuntimeError: a cosmic ray (attempt 2 of this queue; last checkpoint at step 2)"
    assert said.err.endswith(f"a: failed: {reason}; the same command tries again from the last checkpoint\n")
    assert (state(house)["state"], state(house)["error"]) == ("failed", reason)
    assert (index(house)["a"]["state"], index(house)["a"]["error"]) == ("failed", reason)
    assert log(house).splitlines()[-1] == "RuntimeError: a cosmic ray"
    assert "Traceback" in log(house)
    assert go_on(house, "a.toml")


def test_a_known_failure_is_not_tried_again(house: House) -> None:
    with failing(lambda: NonFiniteError("nothing but NaN"), lambda *_: True) as failed:
        assert house.fluxrun("queue", lora(house)).code == 1
    assert failed == [0]
    assert (state(house)["state"], state(house)["error"]) == ("failed", "nothing but NaN")
    house.write("pictures/9.png", "no picture at all")
    (house.folder / "pictures" / "9.txt").write_text("a TOK")
    said = house.fluxrun("queue", lora(house, "b"), "--no-check")
    assert said.code == 1
    assert "trying again" not in said.err
    assert state(house, "b")["attempts"] == 1
    assert "pictures/9.png: not a readable image" in state(house, "b")["error"]


def no_memory() -> Exception:
    return torch.OutOfMemoryError("tried to allocate 20 GiB")


def test_out_of_memory_halves_the_micro_batch_once(house: House, whole: Path) -> None:
    """Same effective batch: the weights differ by rounding alone. What was found out outlives the command."""
    with failing(no_memory, lambda *at: at[3] > 1):
        with stopping_after(2):
            said = house.fluxrun("queue", lora(house))
        assert said.code == 3
        assert (
            "a: out of memory (tried to allocate 20 GiB); trying again with micro-batches of 1, 2 to a step\n"
        ) in said.err
        assert state(house)["split"] == 2
        said = go_on(house, "a.toml")
    assert "out of memory" not in said.err
    assert (state(house)["split"], index(house)["a"]["split"]) == (2, 2)
    name = Path("a/export/pytorch_lora_weights.safetensors")
    ours, theirs = load_file(house.folder / "runs" / name), load_file(whole / name)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < SPACING
    assert max(float(theirs[key].abs().max()) for key in ours) > 1e-3


@pytest.mark.slow
def test_control_half_the_batch_without_twice_the_accumulation_is_seen(
    house: House, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A split that only ever looks at a batch's first half."""
    from runner.training.loop import LoopConfig

    made: Callable[..., None] = LoopConfig.__init__
    monkeypatch.setattr(LoopConfig, "__init__", lambda self, *a, **k: made(self, *a[:3], 1, *a[4:], **k))
    with failing(no_memory, lambda *at: at[3] > 1):
        go_on(house, lora(house))
    name = Path("a/export/pytorch_lora_weights.safetensors")
    ours, theirs = load_file(house.folder / "runs" / name), load_file(whole / name)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) > SPACING


@pytest.mark.parametrize("batch", [1, 4])
def test_out_of_memory_for_good_comes_with_advice(house: House, batch: int) -> None:
    """One picture cannot be halved; and half of four that does not fit either is not halved again."""
    with failing(no_memory, lambda *_: True) as failed:
        said = house.fluxrun("queue", lora(house, batch_size=f"batch_size = {batch}"))
    assert said.code == 1
    assert len(failed) == (1 if batch == 1 else 2)
    one = "train.batch_size = 1 with train.accumulate = 4 or " if batch == 4 else ""
    advice = (
        "set model.gradient_checkpointing = true and queue it again, which goes on where it is, or give it another `name` and "
        f'model.quantize = "int8"{", " if one else " or "}{one}a lower data.resolution, which begins anew'
    )
    assert state(house)["error"] == f"out of memory (tried to allocate 20 GiB); {advice}"
    assert f"{advice}\n" in said.err, "and no word of trying the same again"


def test_trouble_with_the_disk_pauses_the_run_and_the_next_goes_on(house: House, whole: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    with failing(lambda: error, lambda name, step, *_: name == "a" and step == 3):
        said = house.fluxrun("queue", lora(house, "a"), lora(house, "b"))
    assert said.code == 3
    reason = "No space left on device (somewhere); the checkpoint before it stands"
    assert f"a: paused: {reason}\n" in said.err
    assert (state(house)["state"], state(house)["error"]) == ("stopped", reason)
    assert index(house)["a"]["error"] == reason
    assert log(house).splitlines()[-1].endswith(reason)
    assert_same(house, "b", whole)
    go_on(house, "a.toml", "b.toml")
    assert_same(house, "a", whole)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", "ENOENT", "EMFILE"])
def test_which_errors_are_the_disks(name: str) -> None:
    from runner.engine.worker_main import classify_error

    code, _ = classify_error(OSError(getattr(errno, name), "x"))
    assert code == (ExitCode.CRASHED if name in ("ENOENT", "EMFILE") else ExitCode.DISK)


def test_one_runs_failure_leaves_the_others_as_if_alone(house: House, whole: Path) -> None:
    """Crashes, memory, and a failure for good, in one night; the last run knows nothing of them."""
    with failing(ray, lambda name, *_: name == "x"), failing(no_memory, lambda name, *_: name == "y"):
        said = house.fluxrun("queue", *(lora(house, name) for name in ("x", "a", "y", "b")))
    assert said.code == 1
    assert {name: record["state"] for name, record in index(house).items()} == {
        "a": "done", "b": "done", "x": "failed", "y": "failed",
    }  # fmt: skip
    for name in ("a", "b"):
        assert_same(house, name, whole)
        assert set(export_bytes(house.folder / "runs" / name)) == set(export_bytes(whole / name))
