"""Whole runs: what a user types, and what they find on disk."""

from __future__ import annotations

import json
import shutil
import signal
import time
import tomllib

import pytest
import torch
from safetensors.torch import load_file

from runner.checkpoint import storage
from runner.runs import checkpoint_files
from tests.support.house import House
from tests.support.runs import export_bytes


def test_a_pivotal_run_leaves_what_the_contract_names(done: House) -> None:
    run = done.folder / "runs" / "a"
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["step"], state["steps"], state["attempts"]) == ("done", 6, 6, 1)
    resolved = tomllib.loads((run / "spec.toml").read_text())
    assert resolved["lora"]["alpha"] == 4.0
    assert resolved["fluxrun"]["version"] == "0.1.0"
    assert (run / "plan.json").is_file()
    assert [path.name for path in sorted(run.glob("checkpoints/*"))] == [
        "step-000002.safetensors",
        "step-000003.safetensors",  # the pivot
        "step-000004.safetensors",
        "step-000006.safetensors",
    ]
    assert sorted(path.name for path in run.glob("samples/*")) == [
        "before-after.png",
        "step-000000-0.png",
        "step-000006-0.png",
    ]
    assert sorted(path.name for path in run.glob("export/*")) == [
        "README.md",
        "a.safetensors",
        "a_emb.safetensors",
        "a_emb_webui.safetensors",
        "pytorch_lora_weights.safetensors",
        "samples",
    ]
    [record] = [json.loads(line) for line in (done.folder / "runs" / "index.jsonl").read_text().splitlines()]
    wanted = (
        "name state spec_digest started finished wall_s steps s_per_step peak_memory_bytes train_loss eval_loss "
        "exports base versions error"
    )
    assert set(wanted.split()) <= record.keys()
    assert record["train_loss"] > 0
    assert 0 < record["export_error"] == max(state["export_errors"].values()) < 0.02  # of the rows, rounded to bf16
    assert record["peak_memory_bytes"] > 2**26
    assert not list(done.folder.glob("**/*.partial"))


def test_rows_and_lora_learn_in_their_phases_only(done: House) -> None:
    folder = done.folder / "runs" / "a" / "checkpoints"
    at = {step: storage.read(folder / checkpoint_files.checkpoint_name(step)) for step in (2, 3, 4, 6)}
    for encoder, width in (("clip", 64), ("t5", 96)):
        rows = {step: at[step].weights.rows[encoder] for step in at}
        assert rows[2].shape == (2, width)
        assert not torch.equal(rows[2], rows[3])  # still learning
        assert torch.equal(rows[3], rows[4])  # the pivot fixed them
        assert torch.equal(rows[3], rows[6])
    one = "transformer_blocks.0.attn.to_q.lora_B.weight"
    assert not torch.equal(at[3].weights.lora[one], at[4].weights.lora[one])
    assert all(tensor.dtype == torch.float32 for tensor in at[6].weights.lora.values())
    assert at[6].optimizer[f"lora/{one}/step"].item() == 6  # the LoRA's optimizer state crossed the pivot
    assert not any(name.startswith("rows/") for name in at[6].optimizer)


def test_exports_hold_the_trained_values(done: House) -> None:
    run = done.folder / "runs" / "a"
    trained = storage.read(run / "checkpoints" / "step-000006.safetensors").weights
    lora = load_file(run / "export" / "pytorch_lora_weights.safetensors")
    assert lora.keys() == {f"transformer.{name}" for name in trained.lora}
    assert all(torch.equal(lora[f"transformer.{name}"], value.bfloat16()) for name, value in trained.lora.items())
    original = load_file(run / "export" / "a.safetensors")
    rows = load_file(run / "export" / "a_emb.safetensors")
    assert set(rows) == {"clip_l", "t5", "t5xxl"}
    assert torch.equal(rows["clip_l"], trained.rows["clip"].bfloat16())
    assert torch.equal(rows["t5xxl"], trained.rows["t5"].bfloat16())
    stored = [*lora.values(), *rows.values(), *(value for key, value in original.items() if not key.endswith(".alpha"))]
    assert {value.dtype for value in stored} == {torch.bfloat16}  # `equal` is content with the same values in fp32


@pytest.mark.parametrize(
    ("changes", "kinds", "files"),
    [
        ({"drop": "[[tokens]]"}, ["encode", "lora", "export"], {"b.safetensors", "pytorch_lora_weights.safetensors"}),
        ({"rank": "until = 0"}, ["encode", "inversion", "export"], {"b_emb.safetensors", "b_emb_webui.safetensors"}),
        (
            {"encoders": 'encoders = ["clip"]'},
            ["encode", "joint", "encode-learned", "lora", "export"],
            {"b.safetensors", "b_emb.safetensors", "pytorch_lora_weights.safetensors"},
        ),
        (
            {"rank": "until = 0.5", "lr": "until = 1.0"},
            ["encode", "joint", "inversion", "export"],
            {"b.safetensors", "b_emb.safetensors", "b_emb_webui.safetensors", "pytorch_lora_weights.safetensors"},
        ),
    ],
    ids=["lora", "inversion", "clip-pivotal", "lora-stops-first"],
)
def test_every_kind_of_run(house: House, changes: dict[str, str], kinds: list[str], files: set[str]) -> None:
    spec = house.spec("b", **changes)
    if changes.get("drop"):  # no tokens: no table about them either
        lines = spec.read_text().splitlines()
        start = lines.index("[inversion]")
        spec.write_text("\n".join(lines[:start] + lines[start + 3 :]))
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    run = house.folder / "runs" / "b"
    plan = json.loads((run / "plan.json").read_text())
    assert [phase["name"] for phase in plan["phases"]] == kinds
    assert {path.name for path in run.glob("export/*.safetensors")} == files
    last = storage.read(max(run.glob("checkpoints/*")))
    assert last.step == 6
    if "b_emb.safetensors" in files:
        rows = load_file(run / "export" / "b_emb.safetensors")
        assert ("t5" in rows) == (changes.get("encoders") is None)


def test_the_same_command_again_skips_what_is_done(done: House) -> None:
    said = done.fluxrun("queue", "a.toml")
    assert said.code == 0
    assert said.err == "a: skipped, done (same spec, data and base; its exports are there)\n"


def test_a_changed_spec_is_refused_with_the_difference(house: House) -> None:
    assert house.fluxrun("queue", house.spec(steps="steps = 2")).code == 0
    before = export_bytes(house.folder / "runs" / "a")
    said = house.fluxrun("queue", house.spec(steps="steps = 2", rank="rank = 8"))
    assert said.code == 2
    assert "runs/a holds another run: lora.rank: 4 -> 8; give" in said.err  # lora.alpha, which nobody set, is not named
    assert "--fresh" in said.err
    assert export_bytes(house.folder / "runs" / "a") == before
    assert house.fluxrun("queue", "a.toml", "--fresh").code == 0
    assert export_bytes(house.folder / "runs" / "a.old-1") == before
    assert export_bytes(house.folder / "runs" / "a") != before


def test_changed_pictures_are_refused_too(house: House) -> None:
    assert house.fluxrun("queue", house.spec(steps="steps = 2")).code == 0
    (house.folder / "pictures" / "01.txt").write_text("a TOK, quite different")
    said = house.fluxrun("queue", "a.toml")
    assert said.code == 2
    assert (
        "runs/a holds another run: captions changed: 01.png ('a TOK on a white background in the middle' -> 'a TOK, quite "
        "different'); give this spec another"
    ) in said.err


def test_a_second_spec_on_the_same_data_hits_the_cache(done: House, house: House) -> None:
    cache = house.folder / "runs" / "cache"
    shutil.copytree(done.folder / "runs" / "cache", cache)
    cached = {path: path.stat().st_ino for path in cache.glob("latents/**/*.safetensors")}
    assert len(cached) == 10
    said = house.fluxrun("queue", house.spec("c", steps="steps = 2", prompts="prompts = []"))
    assert said.code == 0, said.err
    assert "latents of 10 views, 0 to make" in said.err
    after = {path: path.stat().st_ino for path in cache.glob("latents/**/*.safetensors")}
    assert after == cached  # the files themselves: one that is written again is another one, put in its place


def test_prompts_may_change_without_training_again(house: House) -> None:
    assert house.fluxrun("queue", house.spec(steps="steps = 2")).code == 0
    said = house.fluxrun(
        "queue", house.spec(steps="steps = 2", prompts='prompts = ["a large TOK", "a TOK on the left"]')
    )
    assert said.code == 0, said.err
    assert "joint: skipped, trained to step 2" in said.err
    assert (house.folder / "runs" / "a" / "samples" / "step-000002-1.png").is_file()


def test_one_failing_run_does_not_stop_the_next(house: House) -> None:
    house.write("pictures/9.png", "no picture at all")
    (house.folder / "pictures" / "9.txt").write_text("a TOK")
    bad = house.spec("bad", steps="steps = 1")
    good = house.spec("good", steps="steps = 1", source='source = "others"')
    (house.folder / "others").mkdir()
    for name in ("01.png", "01.txt"):
        (house.folder / "others" / name).write_bytes((house.folder / "pictures" / name).read_bytes())
    said = house.fluxrun("queue", bad, good, "--no-check")
    assert said.code == 1
    states = {row["name"]: row for row in json.loads(house.fluxrun("status", "--json").out)}
    assert states["bad"]["state"] == "failed"
    assert "pictures/9.png: not a readable image" in states["bad"]["error"]
    assert states["good"]["state"] == "done"
    assert "Traceback" in (house.folder / "runs" / "bad" / "run.log").read_text()


def test_stopped_by_signals_and_resumed_gives_the_same_bytes(house: House) -> None:
    """In the middle of a phase, at the ends of both, and in the export; each time going on in a new process."""
    spec = house.spec(every="every = 4", steps="steps = 3")
    assert house.fluxrun("queue", spec, "--runs", "unbroken").code == 0
    for _ in range(9):
        process = house.start("queue", spec)
        assert process.stderr is not None
        for line in process.stderr:
            if ": steps" in line or "export: started" in line:
                process.send_signal(signal.SIGTERM)
                break
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == 3
        state = json.loads((house.folder / "runs" / "a" / "state.json").read_text())
        assert state["state"] == "stopped"
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    attempts = json.loads((house.folder / "runs" / "a" / "state.json").read_text())["attempts"]
    assert attempts > 3
    assert export_bytes(house.folder / "runs" / "a") == export_bytes(house.folder / "unbroken" / "a")


def test_a_damaged_checkpoint_is_passed_over(house: House) -> None:
    spec = house.spec(steps="steps = 6")
    assert house.fluxrun("queue", spec).code == 0
    run = house.folder / "runs" / "a"
    unbroken = export_bytes(run)
    newest = run / "checkpoints" / "step-000006.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-100] ^= 1
    newest.write_bytes(damaged)
    (run / "state.json").write_text((run / "state.json").read_text().replace('"done"', '"running"'))
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    assert "does not match its digest" in said.err
    assert "resuming at step 4 of 6" in said.err
    assert export_bytes(run) == unbroken


def test_two_commands_on_one_run(house: House) -> None:
    spec = house.spec(steps="steps = 100000")  # it shall not be done before the second one has looked
    first = house.start("queue", spec)
    assert first.stderr is not None
    for line in first.stderr:
        if "joint: steps" in line:
            break
    said = house.fluxrun("queue", spec)
    assert said.code == 3
    assert said.err == f"a: not run: process {first.pid} is working on runs/a; wait for it, or stop it\n"
    [row] = json.loads(house.fluxrun("status", "--json").out)
    assert row["state"] == "running"
    first.kill()
    first.communicate()
    time.sleep(0.1)
    [row] = json.loads(house.fluxrun("status", "--json").out)
    assert (row["state"], row["error"]) == ("stopped", "its process is gone")


def test_stop_at_refuses_what_is_no_time(house: House) -> None:
    said = house.fluxrun("queue", house.spec(), "--stop-at", "7 o'clock")
    assert said.code == 2
    assert "is not a time of day; write HH:MM" in said.err
    assert not (house.folder / "runs").exists()


def test_a_run_without_an_eval_loss(house: House) -> None:
    """It trains to the same bytes, and nothing says that there was one; what goes by it is refused."""
    exported = []
    for name, more in (("with", "steps = 2"), ("without", "steps = 2\nloss = false")):
        spec = house.spec(name)
        spec.write_text(spec.read_text().replace("steps = 2\n", more + "\n"))
        assert house.fluxrun("queue", spec).code == 0
        exported.append((house.folder / "runs" / name / "export" / "pytorch_lora_weights.safetensors").read_bytes())
    states = {
        name: json.loads((house.folder / "runs" / name / "state.json").read_text()) for name in ("with", "without")
    }
    assert states["with"]["eval_loss"] > 0
    assert "eval_loss" not in states["without"]
    assert "eval loss" not in (house.folder / "runs" / "without" / "run.log").read_text()
    assert exported[0] == exported[1]
    late = house.spec("late")
    late.write_text(late.read_text() + "loss = false\nevery = 2\n[stop]\nat = 0.1\n")
    said = house.fluxrun("plan", late)
    assert said.code == 2
    assert "stop.at: needs the eval loss, which validate.loss = false turns off; remove that" in said.err
