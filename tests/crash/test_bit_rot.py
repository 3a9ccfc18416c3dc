"""Bits that change on the disk: every kind of damage to the newest checkpoint is noticed, the loader goes one back, and
the bad file lies in quarantine/ with the reason. Then the shared cache, where what is damaged is made again."""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner.cache.store import Cache
from runner.checkpoint import storage
from runner.checkpoint.storage import Weights, named_tensors
from runner.core.errors import BadFileError
from runner.model import tensors
from runner.plan.phases import Encode
from runner.runs.checkpoint_files import checkpoint_name
from runner.training.context import RunContext
from runner.training.encoders import CachedEncoder
from runner.training.objective import _read_moments
from runner.training.phases.encode import encode_phase
from tests.support.checkpoints import Run, content, encoded, made, new_run, newest, whole
from tests.support.house import House
from tests.support.runs import context_of

SIZE = 12_000  # 48 KB
GOOD, OLDER, OTHER = encoded(made(40, SIZE)), encoded(made(30, SIZE)), encoded(made(50, SIZE))
HEADER = 8 + struct.unpack("<Q", GOOD[:8])[0]


def flipped(at: int, bit: int) -> bytes:
    return GOOD[:at] + bytes([GOOD[at] ^ 1 << bit]) + GOOD[at + 1 :]


def damages() -> Iterator[tuple[str, bytes]]:
    """(what was done, what stands in the file of step 40 then)"""
    draw = random.Random(0)
    for start in range(0, len(GOOD), 1024):
        yield "a bit per KiB", flipped(draw.randrange(start, min(start + 1024, len(GOOD))), draw.randrange(8))
    for at in range(HEADER):
        yield "each byte of the header", flipped(at, draw.randrange(8))
    for length in (0, len(GOOD) // 2, len(GOOD) - 1):
        yield "cut off", GOOD[:length]
    for more in (b"\0", b"x"):
        yield "a byte appended", GOOD + more
    for start in range(0, len(GOOD), 4096):
        length = min(4096, len(GOOD) - start)
        yield "a page zeroed", GOOD[:start] + bytes(length) + GOOD[start + length :]
    yield "another step's file under this name", OLDER
    yield "a later step's file under this name", OTHER


def damaged_run(data: bytes) -> Run:
    run = new_run()
    (run.checkpoints / checkpoint_name(30)).write_bytes(OLDER)
    (run.checkpoints / checkpoint_name(40)).write_bytes(data)
    return run


def test_every_damage_is_noticed_and_the_step_before_taken() -> None:
    counts: dict[str, int] = {}
    silent: dict[str, int] = {}
    right = named_tensors(made(40, SIZE))
    for what, data in damages():
        run = damaged_run(data)
        silent[what] = silent.get(what, 0) + loaded_silently(run.checkpoints / checkpoint_name(40), right)
        lines: list[str] = []
        found = newest(run, lines.append)
        assert found is not None
        assert (found.step, whole(found, SIZE)) == (30, True), what
        [bad] = [path for path in run.quarantine_folder.iterdir() if path.suffix != ".txt"]
        assert bad.name == "step-000040.safetensors-1"
        assert bad.read_bytes() == data
        reason = bad.with_name(f"{bad.name}.txt").read_text().strip()
        assert lines == [f"{reason}; moved to {bad}, trying the checkpoint before it", "resuming at step 30 of 99"]
        assert list(content(run.checkpoints)) == [checkpoint_name(30)]
        counts[what] = counts.get(what, 0) + 1
        shutil.rmtree(run.runs)
    cases = sum(counts.values())
    print(f"bit rot: {cases} cases, all noticed {counts}")
    print(f"bit rot, control safetensors' own loader: {sum(silent.values())} of {cases} loaded silently {silent}")
    assert cases > 500
    assert sum(silent.values()) > 60
    assert silent["a bit per KiB"] > 40


def loaded_silently(path: Path, right: dict[str, torch.Tensor]) -> bool:
    """The negative control: what safetensors itself makes of the file."""
    try:
        found = load_file(path)
    except Exception:  # noqa: BLE001 - however it says so, it said so
        return False
    same = found.keys() == right.keys() and all(
        found[name].dtype == right[name].dtype and torch.equal(found[name], right[name]) for name in right
    )
    return not (same and path.read_bytes()[:HEADER] == GOOD[:HEADER])


def test_two_checkpoints_swapped_are_both_noticed() -> None:
    run = new_run()
    (run.checkpoints / checkpoint_name(20)).write_bytes(encoded(made(20, SIZE)))
    (run.checkpoints / checkpoint_name(30)).write_bytes(GOOD)
    (run.checkpoints / checkpoint_name(40)).write_bytes(OLDER)
    found = newest(run)
    assert found is not None
    assert found.step == 20
    assert {path.name: path.read_text() for path in run.quarantine_folder.glob("*.txt")} == {
        f"step-0000{wrong}.safetensors-1.txt": f"{run.checkpoints / checkpoint_name(wrong)}: the header says step {said}\n"
        for wrong, said in ((30, 40), (40, 30))
    }


def test_nothing_in_quarantine_is_overwritten() -> None:
    run = new_run()
    for number in (1, 2, 3):
        (run.checkpoints / checkpoint_name(40)).write_bytes(GOOD[: -10 * number])
        assert newest(run) is None
    bad = [path for path in sorted(run.quarantine_folder.iterdir()) if path.suffix != ".txt"]
    assert [path.read_bytes() for path in bad] == [GOOD[: -10 * number] for number in (1, 2, 3)]


def test_what_was_verified_no_longer_depends_on_its_file() -> None:
    """safetensors' own tensors are views of the file: a byte changed after the check would reach the training."""
    run = damaged_run(GOOD)
    path = run.checkpoints / checkpoint_name(40)
    ours, theirs = storage.read(path), load_file(path)
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\xff\xff\xff\xff")
    assert whole(ours, SIZE)
    del theirs


def test_a_dtype_we_never_write_is_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / checkpoint_name(40)
    header = b'{"__metadata__":{"format":"1"},"a":{"dtype":"F8_E5M2","shape":[8],"data_offsets":[0,8]}}'
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(BadFileError, match="a dtype that fluxrun never writes"):
        tensors.load(path)


@pytest.mark.parametrize("name", ["EACCES", "EPERM", "EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ETIMEDOUT", "EINTR"])
def test_what_cannot_be_opened_is_not_called_bad(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells nothing against the file: a run must not start from an older step, or anew, for it."""
    run, number = damaged_run(GOOD), getattr(errno, name)
    error, real = OSError(number, os.strerror(number)), Path.open

    def refused(path: Path, *arguments: object, **more: object) -> object:
        if path.name == checkpoint_name(40):
            raise error
        return real(path, *arguments, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(OSError, match=error.strerror or ""):
        newest(run)
    assert not run.quarantine_folder.exists()
    monkeypatch.undo()
    found = newest(run)
    assert found is not None
    assert found.step == 40


# ---- the shared cache ----------------------------------------------------------------------------------------------


def test_damaged_and_swapped_cache_entries_are_made_again(house: House) -> None:
    """What training reads is what was there before, and so are the files."""
    spec = house.spec(drop="[[tokens]]")
    text = spec.read_text()
    spec.write_text(text[: text.index("[inversion]")] + text[text.index("[lora]") :])
    context = context_of(spec)
    encode_phase(context, next(phase for phase in context.plan.phases if isinstance(phase, Encode)), Weights())
    clean = read_by_training(context)
    before = {path: path.read_bytes() for path in sorted(context.cache.folder.rglob("*.safetensors"))}
    clip, *_, one, other = (path for path in before if path.parts[-3] in ("clip", "latents"))
    t5 = next(path for path in before if path.parts[-3] == "t5")
    clip.write_bytes(before[clip][:-1] + bytes([before[clip][-1] ^ 1]))
    t5.write_bytes(before[t5][: len(before[t5]) // 2])
    one.write_bytes(before[other])
    other.write_bytes(before[one])
    assert sum(path.read_bytes() != data for path, data in before.items()) == 4
    again = read_by_training(context)
    assert clean.keys() == again.keys()
    assert all(torch.equal(clean[name], again[name]) for name in clean)
    assert all(path.read_bytes() == data for path, data in before.items())


def read_by_training(context: RunContext) -> dict[object, torch.Tensor]:
    encoders = [CachedEncoder(context, name, Weights()) for name in ("clip", "t5")]
    return {
        **_read_moments(context),
        **{(one.encoder.name, *key): value for one in encoders for key, value in one.embeddings.items()},
    }


def test_every_damage_to_a_cache_entry_is_noticed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("latents", "aaaa", torch.ones(300), {"image": "1.png"})
    cache.put("latents", "bbbb", torch.zeros(300), {"image": "2.png"})
    path = cache.path("latents", "aaaa")
    whole, other = path.read_bytes(), cache.path("latents", "bbbb").read_bytes()
    draw = random.Random(1)
    damages = [whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :] for at in range(len(whole))]
    damages += [b"", whole[:-1], whole[: len(whole) // 2], whole + b"x", bytes(len(whole)), other]
    for data in damages:
        path.write_bytes(data)
        assert cache.get("latents", "aaaa") is None
        assert not cache.has("latents", "aaaa")
    print(f"bit rot, a cache entry: {len(damages)} cases, all noticed")
    path.write_bytes(whole)
    found = cache.get("latents", "aaaa")
    assert found is not None
    assert torch.equal(found, torch.ones(300))
