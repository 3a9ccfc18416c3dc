"""Advice that fluxrun prints is followed here: the fault is made, the advice typed, the fault is gone."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pytest

from runner.core.errors import NonFiniteError
from runner.engine import outcomes
from runner.jobs.card_fit import less_memory
from runner.jobs.prepare import prepare_jobs
from runner.spec.keys import spec_keys
from runner.spec.loader import load
from runner.spec.other_trainers import NO_KEY, PROGRAMS
from tests.support.checks import report
from tests.support.house import House

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("bare_machine")

LEAST = '[model]\nbase = "builtin:tiny"\n[data]\nsource = "pictures"\nresolution = 64\n[train]\nsteps = 10\n'
TOP = (
    "checkpoint, compute, data, export, extends, hub, inversion, lora, model, name, notify, optimizer, prior, schedule, seed, "
    "stop, sweep, text_lora, tokens, track, train, validate"
)


def plan(house: House, text: str) -> list[str]:
    """What `fluxrun plan` says is wrong, less the file's name and the last line."""
    said = house.fluxrun("plan", house.write("a.toml", text))
    assert (said.code == 0) == (said.err == "")
    return [line.removeprefix(f"{house.folder}/a.toml:") for line in said.err.splitlines()[:-1]]


# name -> (the faulty text, what is said, the text with the advice followed)
FOLLOWED: dict[str, tuple[str, str, str]] = {
    "a number in quotes": (
        LEAST.replace("= 10", '= "10"'),
        "7: train.steps: expected a whole number, got '10'; allowed: at least 1; write it without quotes: 10 (number of "
        "optimisation steps; set this or train.epochs)",
        LEAST,
    ),
    "a float": (
        LEAST.replace("= 10", "= 10.0"),
        "7: train.steps: expected a whole number, got 10.0; allowed: at least 1; write 10 (number of optimisation steps; set "
        "this or train.epochs)",
        LEAST,
    ),
    "a word for true": (
        f'{LEAST}scale_lr = "yes"\n',
        "8: train.scale_lr: expected true or false, got 'yes'; write true, without quotes (multiply the learning rate by the "
        "number of images per step)",
        f"{LEAST}scale_lr = true\n",
    ),
    "a list of rates": (
        f"{LEAST}lr = [1e-4, 1e-3]\n",
        '8: train.lr: expected a number, got [0.0001, 0.001]; allowed: more than 0; to try one after the other, write "train.lr" '
        "= [0.0001, 0.001] below [sweep] (learning rate; default 1e-4, with Prodigy 1.0)",
        f'{LEAST}[sweep]\n"train.lr" = [0.0001, 0.001]\n',
    ),
    "one prompt": (
        f'{LEAST}[validate]\nprompts = "a"\n',
        "9: validate.prompts: expected a list of text, got 'a'; write prompts = [\"a\"] (prompts of the sample pictures, which "
        "name tokens as captions do)",
        f'{LEAST}[validate]\nprompts = ["a"]\n',
    ),
    "no multiple of 16": (
        LEAST.replace("= 64", "= 100"),
        "5: data.resolution: expected a multiple of 16, got 100; allowed: 16 to 8192 in steps of 16; write 96 or 112 (side of "
        "the training square in pixels; a list trains each image at several)",
        LEAST.replace("= 64", "= 112"),
    ),
    "below the range": (
        f"{LEAST}[lora]\nrank = 0\n",
        "9: lora.rank: expected at least 1, got 0; allowed: 1 to 4096 (rank of the LoRA's matrices)",
        f"{LEAST}[lora]\nrank = 1\n",
    ),
    "[tokens]": (
        f'{LEAST}[tokens]\nname = "TOK"\n[inversion]\nlr = 0.1\n[lora]\nuntil = 0\n',
        "8: tokens: expected a list of tables, got a table; write [[tokens]], in double brackets, above each token's keys",
        f'{LEAST}[[tokens]]\nname = "TOK"\n[inversion]\nlr = 0.1\n[lora]\nuntil = 0\n',
    ),
    "[[lora]]": (
        f"{LEAST}[[lora]]\nrank = 4\n",
        "8: lora: expected a table, got a list of tables; write [lora], in single brackets",
        f"{LEAST}[lora]\nrank = 4\n",
    ),
    "a token's name alone": (
        f'tokens = ["TOK"]\n{LEAST}',
        '1: tokens.0: expected a table, got \'TOK\'; write [[tokens]], and below it name = "TOK"',
        f'{LEAST}[[tokens]]\nname = "TOK"\n',
    ),
    "an optimizer's name alone": (
        f'optimizer = "prodigy"\n{LEAST}',
        '1: optimizer: expected a table, got \'prodigy\'; write [optimizer], and below it name = "prodigy"',
        f'{LEAST}[optimizer]\nname = "prodigy"\n',
    ),
    "a token of two words": (
        f'{LEAST}[[tokens]]\nname = "TOK 2"\n',
        "9: tokens.0.name: expected the letters A-Z and a-z, digits and _, beginning with no digit, got 'TOK 2'; write "
        "\"TOK_2\" (the word that stands for the concept in prompts and captions)",
        f'{LEAST}[[tokens]]\nname = "TOK_2"\n',
    ),
    "no base": (
        LEAST.replace('[model]\nbase = "builtin:tiny"\n', ""),
        '1: model: required table is missing; write [model] and below it base = "black-forest-labs/FLUX.1-dev"',
        LEAST.replace("builtin:tiny", "black-forest-labs/FLUX.1-dev"),
    ),
    "no length": (
        LEAST.replace("steps = 10", "lr = 1e-4"),
        "6: train.steps: required key is missing; write steps = 1000 (or epochs = 10) below [train]",
        LEAST.replace("steps = 10", "epochs = 10"),
    ),
    "a misspelt length": (
        LEAST.replace("steps", "stps"),
        "7: train.stps: unknown key, got stps = 10; allowed here: accumulate, batch_size, epochs, guidance, lr, max_grad_norm, "
        "scale_lr, steps, weighting; did you mean train.steps?",
        LEAST,
    ),
    "a key of another table": (
        f"every = 4\n{LEAST}",
        f"1: every: unknown key, got every = 4; allowed here: {TOP}; every is a key of [checkpoint] or [validate]; write it there",
        f"{LEAST}[checkpoint]\nevery = 4\n",
    ),
    "a key above all tables": (
        f"{LEAST}seed = 4\n",
        "8: train.seed: unknown key, got seed = 4; allowed here: accumulate, batch_size, epochs, guidance, lr, max_grad_norm, "
        "scale_lr, steps, weighting; seed belongs above all tables; write it there",
        f"seed = 4\n{LEAST}",
    ),
    "a rate that is set twice": (
        f"{LEAST}lr = 1e-4\nlearning_rate = 1e-3\n",
        "9: train.learning_rate: unknown key, got learning_rate = 0.001; allowed here: accumulate, batch_size, epochs, guidance, lr, "
        "max_grad_norm, scale_lr, steps, weighting; train.lr is already set, so remove this one",
        f"{LEAST}lr = 1e-4\n",
    ),
    "guidance of the pictures": (
        f"{LEAST}guidance = 1\n[validate]\nguidance = 4\n",
        "10: validate.guidance: unknown key, got guidance = 4; allowed here: count, every, loss, prompts, size, steps; sample pictures "
        "are always drawn at guidance 3.5; train.guidance is for training; remove this key",
        f"{LEAST}guidance = 1\n[validate]\n",
    ),
    "rows without tokens, with text_lora": (
        f"{LEAST}[inversion]\nlr = 1e-3\n[text_lora]\nrank = 4\n",
        "8: inversion: there are no tokens to learn; remove [inversion]",
        f"{LEAST}[text_lora]\nrank = 4\n",
    ),
    "both lengths": (
        f"{LEAST}epochs = 2\n",
        "8: train.epochs: expected train.steps or train.epochs, got both (epochs = 2); remove one",
        LEAST,
    ),
    "best of no look": (
        f"{LEAST}[export]\nbest = true\n",
        "9: export.best: needs the eval loss, which is measured only where validate.every is set; set that too",
        f"{LEAST}[export]\nbest = true\n[validate]\nevery = 5\n",
    ),
    "warm-up of the constant schedule": (
        f"{LEAST}[schedule]\nwarmup = 2\n",
        '9: schedule.warmup: the constant schedule has no warm-up, got 2; use schedule.name = "constant_with_warmup"',
        f'{LEAST}[schedule]\nwarmup = 2\nname = "constant_with_warmup"\n',
    ),
    "cycles of another schedule": (
        f"{LEAST}[schedule]\ncycles = 2\n",
        "9: schedule.cycles: only cosine_with_restarts has cycles, got 2; remove it, or use schedule.name = "
        '"cosine_with_restarts"',
        f'{LEAST}[schedule]\ncycles = 2\nname = "cosine_with_restarts"\n',
    ),
    "power of another schedule": (
        f"{LEAST}[schedule]\npower = 2\n",
        '9: schedule.power: only polynomial has a power, got 2; remove it, or use schedule.name = "polynomial"',
        f'{LEAST}[schedule]\npower = 2\nname = "polynomial"\n',
    ),
    "compiled and offloaded": (
        LEAST.replace('tiny"\n', 'tiny"\ncompile = true\noffload = "blocks"\n'),
        "3: model.compile: compiled blocks cannot be offloaded, got true; remove this key or model.offload",
        LEAST.replace('tiny"\n', 'tiny"\noffload = "blocks"\n'),
    ),
    "selective and compiled": (
        LEAST.replace('tiny"\n', 'tiny"\ncompile = true\ngradient_checkpointing = "selective"\n'),
        "4: model.gradient_checkpointing: compiled blocks are recomputed as a whole, got \"selective\"; use true, or n for "
        "every n-th block",
        LEAST.replace('tiny"\n', 'tiny"\ncompile = true\ngradient_checkpointing = true\n'),
    ),
    "above the range of 2**31": (
        f"seed = 99999999999999999999999999\n{LEAST}",
        "1: seed: expected at most 2147483648, got 99999999999999999999999999; allowed: 0 to 2147483648 (seed of everything random)",
        f"seed = 2147483648\n{LEAST}",
    ),
    "an empty prompt": (
        LEAST.replace("resolution = 64", 'resolution = 64\nprompt = ""'),
        "6: data.prompt: expected text that is not empty, got '' (caption of every image that has none of its own)",
        LEAST.replace("resolution = 64", 'resolution = 64\nprompt = "a dog"'),
    ),
    "an empty base": (
        LEAST.replace("builtin:tiny", ""),
        "2: model.base: expected text that is not empty, got '' (hub id, folder in diffusers' layout, or builtin:tiny)",
        LEAST,
    ),
    "a table in capitals": (
        f"{LEAST}[LoRA]\nrank = 4\n",
        f"8: LoRA: unknown table, got LoRA = {{'rank': 4}}; allowed here: {TOP}; did you mean [lora]?",
        f"{LEAST}[lora]\nrank = 4\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_fault_is_mended_by_what_its_message_says(house: House, name: str) -> None:
    faulty, said, mended = FOLLOWED[name]
    assert plan(house, faulty) == [said], "one fault, and nothing that only follows from it"
    if name == "a token of two words":
        (house.folder / "pictures" / "01.txt").write_text("a TOK_2")
    assert plan(house, mended) == []


def test_two_faults_of_one_reason_are_told_at_once(house: House) -> None:
    told = plan(house, f"{LEAST}[validate]\nloss = false\n[stop]\nat = 0.5\n")
    assert told == [
        "11: stop.at: needs the eval loss, which is measured only where validate.every is set; set that too",
        "11: stop.at: needs the eval loss, which validate.loss = false turns off; remove that",
    ]
    assert plan(house, f"{LEAST}[validate]\nevery = 5\n[stop]\nat = 0.5\n") == []


# ---- other trainers' names -----------------------------------------------------------------------------------------


def test_what_other_trainers_call_a_key_is_a_key_here() -> None:
    keys = set(spec_keys())
    for program, names in PROGRAMS.items():
        for name, here in names.items():
            assert here.partition(" = ")[0].strip("[]") in keys, (program, name)
            assert name not in NO_KEY


@pytest.mark.parametrize(
    ("line", "meant", "mended"),
    [
        ("network_dim = 4", "did you mean lora.rank, which sd-scripts calls network_dim?", "[lora]\nrank = 4"),
        ("network_alpha = 4", "did you mean lora.alpha, which sd-scripts calls network_alpha?", "[lora]\nalpha = 4"),
        ("unet_lr = 1e-4", "did you mean train.lr, which sd-scripts calls unet_lr?", "lr = 1e-4"),
        (
            "text_encoder_lr = 1e-4",
            "did you mean inversion.lr, which the reference script calls text_encoder_lr?",
            '[[tokens]]\nname = "TOK"\n[inversion]\nlr = 1e-4',
        ),
        (
            "save_every_n_steps = 2",
            "did you mean checkpoint.every, which sd-scripts calls save_every_n_steps?",
            "[checkpoint]\nevery = 2",
        ),
        (
            'optimizer_type = "prodigy"',
            "did you mean optimizer.name, which sd-scripts calls optimizer_type?",
            '[optimizer]\nname = "prodigy"',
        ),
        (
            "lr_scheduler_num_cycles = 2",
            "did you mean schedule.cycles, which sd-scripts calls lr_scheduler_num_cycles?",
            '[schedule]\nname = "cosine_with_restarts"\ncycles = 2',
        ),
        ("linear = 4", "did you mean lora.rank, which ai-toolkit calls linear?", "[lora]\nrank = 4"),
        ("linear_alpha = 4", "did you mean lora.alpha, which ai-toolkit calls linear_alpha?", "[lora]\nalpha = 4"),
        (
            'trigger_word = "TOK"',
            "did you mean [[tokens]], which ai-toolkit calls trigger_word?",
            '[[tokens]]\nname = "TOK"',
        ),
        ("lora_rank = 4", "did you mean lora.rank, which OneTrainer calls lora_rank?", "[lora]\nrank = 4"),
        (
            "clip_grad_norm = 2.0",
            "did you mean train.max_grad_norm, which OneTrainer calls clip_grad_norm?",
            "max_grad_norm = 2.0",
        ),
        (
            'base_model_precision = "int8"',
            "did you mean model.quantize, which SimpleTuner calls base_model_precision?",
            None,
        ),
        (
            "use_8bit_adam = true",
            'did you mean optimizer.name = "adamw8bit", which the reference script calls use_8bit_adam?',
            None,
        ),
        ("r = 4", "did you mean lora.rank, which peft calls r?", "[lora]\nrank = 4"),
        (
            'target_modules = ["attn.to_q"]',
            "did you mean lora.layers, which peft calls target_modules?",
            '[lora]\nlayers = ["attn.to_q"]',
        ),
        ("netwrk_dim = 4", "did you mean lora.rank, which sd-scripts calls network_dim?", "[lora]\nrank = 4"),
        (
            "noise_offset = 0.1",
            "no key here does this (FLUX.1 is trained by flow matching, where it has no meaning); remove it",
            "",
        ),
        (
            'caption_extension = ".txt"',
            "no key here does this (the caption of a picture is in the .txt file beside it); remove it",
            "",
        ),
    ],
)
def test_a_name_from_another_trainer_leads_to_its_key(house: House, line: str, meant: str, mended: str | None) -> None:
    [told] = plan(house, f"{LEAST}{line}\n")
    name = line.partition(" ")[0]
    assert told.startswith(f"8: train.{name}: unknown key, got {name} = ")
    assert told.endswith(f"; {meant}")
    if mended is not None:
        assert plan(house, f"{LEAST}{mended}\n") == []


@pytest.mark.parametrize(("name", "meant"), [("max_train_epochs", "train.epochs"), ("max_train_steps", "train.steps")])
def test_a_length_by_another_trainers_name_is_not_missing_too(house: House, name: str, meant: str) -> None:
    told = plan(house, LEAST.replace("steps", name))
    assert len(told) == 1
    assert f"did you mean {meant}, which " in told[0]


def test_a_foreign_files_own_keys_at_the_top(house: House) -> None:
    for line, meant in (
        ("lr = 1e-4", "did you mean train.lr?"),
        ("batch_size = 2", "did you mean train.batch_size?"),
        ("steps = 5", "train.steps is already set, so remove this one"),
        ("[network]\nlinear = 4", "did you mean [lora], which ai-toolkit calls network?"),
        ("[sample]\nsample_every = 4", "did you mean [validate], which ai-toolkit calls sample?"),
    ):
        [told] = plan(house, f"{line}\n{LEAST}")
        assert told.endswith(f"; {meant}"), told


# ---- follow-on findings --------------------------------------------------------------------------------------------


def test_nothing_is_said_of_a_value_that_stands_in_for_a_faulty_one(house: House) -> None:
    """resolution = 1000 once gave warnings about pictures smaller than 512."""
    code, found = report(house, house.spec(resolution="resolution = 1000"))
    assert code == 2
    assert len(found["error"]) == 1
    assert found["warning"] == []
    code, found = report(house, house.spec(resolution="resolution = 992"))
    assert code == 0
    assert any("smaller than trained at" in one for one in found["warning"])


@pytest.mark.parametrize(
    "more",
    [
        '[schedule]\nname = "cosine_with_restart"\ncycles = 3\n',
        '[schedule]\nnme = "cosine_with_restarts"\ncycles = 3\n',
        '[validate]\nevery = "5"\n[stop]\nno_better_for = 10\n',
        '[[token]]\nname = "TOK"\n[inversion]\nlr = 1e-3\n[lora]\nuntil = 0\n',
        '[prior]\nimages = 5\nprompt = "a dog"\ncount = 3\n',
        '[optimizer]\nname = "prodgy"\n[text_lora]\nlr = 0.5\n',
    ],
)
def test_a_cause_is_told_and_not_its_consequences(house: House, more: str) -> None:
    _, found = report(house, house.write("a.toml", LEAST + more))
    assert len(found["error"]) == 1
    assert not [one for one in found["warning"] if "class images" in one]


def test_a_faulty_key_hides_no_other_fault(house: House) -> None:
    """The rest of the spec is still looked at, also where a table is none without its faulty key."""
    prior = '[prior]\nimages = 5\nprompt = "a dog"\n'
    text = LEAST.replace('"pictures"', '"picturse"').replace("builtin:tiny", "builtin:tyni") + prior
    assert [line.split(": ")[1] for line in plan(house, text)] == ["model.base", "data.source", "prior.images"]
    faulty = LEAST.replace('"pictures"', '"picturse"\nprompt = 5')
    assert [line.split(": ")[1] for line in plan(house, faulty)] == ["data.source", "data.prompt"]


def test_a_stand_in_base_refuses_no_layers(house: House) -> None:
    """Layers of a base that is misspelt are not looked for in the bundled one."""
    lora = '[lora]\nlayers = ["single_transformer_blocks.30.attn.to_q"]\n'
    text = LEAST.replace('base = "builtin:tiny"', "base = 5") + lora
    assert [line.split(": ")[1] for line in plan(house, text)] == ["model.base"]


# ---- memory, lengths, commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize(
    "model",
    [
        "", "gradient_checkpointing = true\n", "gradient_checkpointing = 2\n", 'gradient_checkpointing = "selective"\n',
        "compile = true\n", 'offload = "blocks"\n', 'quantize = "int8"\n',
    ],
)  # fmt: skip
def test_less_memory_names_only_what_is_not_set_and_can_be(house: House, model: str, on_gpu: bool) -> None:
    """Each line that it names is set, alone; where the run is said to go on, its training key stays."""
    text = LEAST.replace('tiny"\n', f'tiny"\n{model}')
    [job] = prepare_jobs([house.write("a.toml", text)], house.folder / "runs", fetch=False, fresh=False)
    advice = less_memory(job.spec, on_gpu=on_gpu)
    keeps, _, anew = advice.rpartition("give it another `name` and ")
    lines = [
        one.strip(" ,")
        for one in keeps.removesuffix("or ").removeprefix("set ").partition(" and queue")[0].split(" or ")
    ]
    assert ("offload" in advice) == (on_gpu and "offload" not in model and "compile" not in model)
    for line in filter(None, lines):
        key, _, value = line.partition(" = ")
        name = key.removeprefix("model.")
        rest = "\n".join(one for one in text.split("\n") if not one.startswith(f"{name} ="))
        if name == "offload":  # the two do not go together, and the spec says which one to take out
            rest = "\n".join(one for one in rest.split("\n") if not one.startswith("gradient_checkpointing"))
        mended = rest.replace('tiny"\n', f'tiny"\n{name} = {value}\n')
        assert mended != text
        [other] = prepare_jobs(
            [house.write("b.toml", f'name = "a"\n{mended}')], house.folder / "runs", fetch=False, fresh=False
        )
        assert getattr(other.spec.model, name) != getattr(job.spec.model, name)
        assert other.plan.training_key == job.plan.training_key, "it is said to go on where it is"
    assert "train.batch_size" not in anew, "one image is the least"
    assert ("quantize" in anew) == ("quantize" not in model)


def test_a_batch_is_divided_only_where_there_is_one(house: House) -> None:
    [loaded] = load([house.write("a.toml", f"{LEAST}batch_size = 4\naccumulate = 2\n")])
    assert less_memory(loaded.spec, on_gpu=False) == (
        "set model.gradient_checkpointing = true and queue it again, which goes on where it is, or give it another `name` "
        'and model.quantize = "int8", train.batch_size = 1 with train.accumulate = 8 or a lower data.resolution, which begins '
        "anew"
    )


def test_a_check_for_little_memory_does_not_name_what_is_set(house: House, monkeypatch: Patch) -> None:
    monkeypatch.setattr("runner.preflight.devices.memory_available", lambda: 12 << 20)
    spec = house.spec(base='base = "builtin:tiny"\ngradient_checkpointing = true', batch_size="batch_size = 1")
    _, found = report(house, spec, "--gpus", "cpu")
    [warning] = [one for one in found["warning"] if "model.base" in one]
    assert "gradient_checkpointing" not in warning
    assert warning.endswith(
        'give it another `name` and model.quantize = "int8" or a lower data.resolution, which begins anew'
    )


def test_captions_are_cut_off_at_the_longest_that_t5_can_read(house: House) -> None:
    (house.folder / "pictures" / "03.txt").write_text("a TOK " + "red " * 600)
    for length, way in ((64, ", or raise model.max_sequence_length (up to 512)"), (512, "")):
        _, found = report(house, house.spec(max_sequence_length=f"max_sequence_length = {length}"))
        [told] = [one for one in found["warning"] if "T5 reads" in one]
        assert f"tokens that T5 reads; shorten them{way}, or accept that the rest is cut off" in told


def test_a_full_disk_asks_for_nothing_that_is_done_already(house: House, monkeypatch: Patch) -> None:
    usage = type(shutil.disk_usage(house.folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 2**19))
    one = house.spec("a", every="every = 2\nkeep = 1")
    for specs, ways in (
        ([one], "free some space"),
        ([one, house.spec("b")], "free some space or lower checkpoint.keep or queue fewer specs"),
    ):
        _, found = report(house, *specs)
        assert found["error"][0].endswith(f"; {ways}")


def test_a_run_whose_loss_is_no_number_says_what_to_change_and_does_so(house: House, monkeypatch: Patch) -> None:
    """The same command would meet it again, and a changed rate is another run."""
    monkeypatch.setattr("runner.training.loop.BAD_STEPS", 1)
    loss = "runner.training.objective.FlowObjective.loss"
    from runner.training.objective import FlowObjective

    real = FlowObjective.loss
    monkeypatch.setattr(loss, lambda self, step, micro: real(self, step, micro) * math.nan)
    fast = {"drop": "[[tokens]]", "steps": "steps = 2"}
    spec = house.spec("a", **fast)
    text = spec.read_text().replace('[inversion]\nencoders = ["clip", "t5"]\nlr = 1e-2\n', "")
    spec.write_text(text)
    said = house.fluxrun("queue", spec)
    assert said.code == 1
    assert said.err.splitlines()[-1] == (
        "a: failed: step 1: no finite loss or gradient in 1 steps in a row (loss nan, gradient norm nan); nothing of them "
        "reached the weights. Lower train.lr (with Prodigy, optimizer.d_coef); the same command would end the same way: "
        "change the spec, and give it another `name` or queue it with --fresh"
    )
    monkeypatch.setattr(loss, real)
    spec.write_text(text.replace("lr = 1e-3", "lr = 1e-4"))
    assert house.fluxrun("plan", spec).code == 2, "another rate is another run"
    assert house.fluxrun("queue", spec, "--fresh", "--dry-run").code == 0


def test_what_a_failed_run_is_told_to_do_next() -> None:
    assert NonFiniteError.code in outcomes.ADVICE
    assert "tries again" not in "".join(outcomes.ADVICE.values()), "a known failure is met again"


def test_fresh_is_not_asked_for_where_it_is_given(done: House, tmp_path: Path) -> None:
    house = House.__new__(House)
    house.folder = tmp_path
    shutil.copytree(done.folder, tmp_path, dirs_exist_ok=True)
    spec = house.spec("a", rank="rank = 8")
    said = house.fluxrun("queue", spec, "--dry-run")
    assert said.code == 2
    assert said.err.splitlines()[0].endswith(
        "undo the change, or queue it with --fresh, which moves the old folder aside"
    )
    said = house.fluxrun("queue", spec, "--dry-run", "--fresh", "--json")
    assert said.code == 0
    [run] = json.loads(said.out)["runs"]
    assert (run["state"], run["reason"]) == ("changed", "lora.rank: 4 -> 8")


# ---- on a terminal, in words ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_check_shows_the_line_with_a_caret_on_a_terminal(house: House, monkeypatch: Patch) -> None:
    from runner.cli.diagnostics import echo_findings
    from runner.jobs.prepare import inspect_specs
    from runner.preflight.check import check

    spec = house.spec(rank="rnk = 4", resolution="resolution = 992")
    seen, faults = inspect_specs([spec], house.folder / "runs", fetch=True, fresh=False)
    found = [one for one in check(seen, faults, house.folder / "runs", "cpu") if one.level != "note"]
    for shown in (True, False):
        monkeypatch.setattr("sys.stdout", screen := Terminal() if shown else io.StringIO())
        echo_findings(found, err=False)
        lines = screen.getvalue().splitlines()
        at = next(number for number, line in enumerate(lines) if "lora.rnk: unknown key" in line)
        assert (lines[at + 1 : at + 3] == ["   14 | rnk = 4", "      | ^^^"]) == shown
        at = next(number for number, line in enumerate(lines) if "pictures smaller than trained at" in line)
        assert (lines[at + 1 : at + 3] == ["    6 | resolution = 992", "      |              ^^^"]) == shown
        assert any(line.startswith("    01.png is 64x64, trained at 992x992") for line in lines[at + 1 :])


def test_a_warning_about_a_default_shows_no_line(house: House) -> None:
    from runner.cli.excerpts import excerpts
    from runner.core.errors import Fault

    file = house.write("a.toml", "[data]\nsource = 1\n")
    for key, shown in (("data.source", True), ("data.resolution", True), ("train.steps", False)):
        fault = Fault(file, 1 if key != "data.source" else 2, key, "said")
        assert (fault in excerpts([fault])) == shown


@pytest.mark.parametrize(
    "days", [(0, 0, "today"), (0, 40, "today to 40 days ago"), (1, 1, "1 day ago"), (3, 9, "3 to 9 days ago")]
)
def test_when_the_cache_was_last_used(days: tuple[int, int, str]) -> None:
    from rich.console import Console

    from runner.cli.cache_entries import CacheKind, kinds_table

    newest, oldest, said = days
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(kinds_table([CacheKind("latents", 3, 2**20, oldest, newest)]))
    text = console.export_text()
    assert "last used" in text
    assert f" {said} " in text


def test_every_key_has_a_meaning_that_reads_as_one(house: House) -> None:
    """No fragment such as "Of everything random": each begins with a noun or a verb."""
    for name, about in spec_keys().items():
        if not about.is_table and not name.endswith((".scheme", "optimizer.name")):
            assert about.meaning, name
            assert not about.meaning.startswith(("Of ", "Steps", "Default", "Instead of", "Part of")), name
