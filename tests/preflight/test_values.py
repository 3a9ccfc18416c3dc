"""`check` says what is allowed and hardly ever meant, and refuses what `queue` refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from runner.runs.claim import claim_run
from tests.support.house import House
from tests.support.paths import PROJECT

ADAM = 'so high that each step undoes the one before (found {}); usual are {}, and 1 with optimizer.name = "prodigy"'
PRODIGY = 'Prodigy finds the step size itself, and this is a factor of it (found {}); set it to 1, or use optimizer.name = "adamw"'
LORA, ROWS = "1e-5 to 1e-3", "1e-4 to 1e-2"


def line_of(spec: Path, start: str, last: bool = False) -> int:
    lines = [number for number, line in enumerate(spec.read_text().splitlines(), 1) if line.startswith(start)]
    return lines[-1 if last else 0]


def told(house: House, spec: Path, *options: str) -> list[tuple[str, int, str, str]]:
    """(level, line, key, message) of what is said of the spec, less notes and what the few steps of a test are."""
    found = json.loads(house.fluxrun("check", spec, "--json", *options).out)["findings"]
    return [
        (one["level"], one["line"], one["key"], one["message"])
        for one in found
        if one["file"] and one["level"] != "note" and one["key"] not in ("train.steps", "data.holdout")
    ]


def plain(house: House, **changes: str) -> Path:
    """A LoRA alone, whose spec has one learning rate."""
    spec = house.spec(**changes)
    text = spec.read_text()
    start, stop = text.index("[[tokens]]"), text.index("[lora]")
    spec.write_text(text[:start] + text[stop:])
    return spec


def test_nothing_is_said_of_usual_values(house: House) -> None:
    assert told(house, house.spec()) == []
    prodigy = house.spec("b", lr="lr = 1.0", every='every = 2\n[optimizer]\nname = "prodigy"')
    prodigy.write_text(prodigy.read_text().replace("lr = 1e-3", "lr = 1.0"))
    assert told(house, prodigy) == []


@pytest.mark.parametrize(
    ("lr", "more", "message"),
    [
        ("1.0", "", ADAM.format("1", LORA)),
        ("0.02", "", ADAM.format("0.02", LORA)),
        ("0.01", "", None),
        (
            "4e-3\nscale_lr = true\naccumulate = 2",
            "",
            ADAM.format("0.004 times 4 images a step, by train.scale_lr", LORA),
        ),
        ("1e-3", '[optimizer]\nname = "prodigy"', PRODIGY.format("0.001")),
        ("20.0", '[optimizer]\nname = "prodigy"', PRODIGY.format("20")),
        ("0.5", '[optimizer]\nname = "prodigy"', None),
    ],
)
def test_rates_of_the_other_optimizer(house: House, lr: str, more: str, message: str | None) -> None:
    spec = plain(house, every=f"every = 2\n{more}")
    spec.write_text(spec.read_text().replace("lr = 1e-3", f"lr = {lr}"))
    wanted = [("warning", line_of(spec, "lr ="), "train.lr", message)] if message else []
    assert told(house, spec) == wanted


def test_rates_of_token_rows(house: House) -> None:
    spec = house.spec(lr="lr = 1.0")
    assert told(house, spec) == [("warning", line_of(spec, "lr ="), "inversion.lr", ADAM.format("1", ROWS))]


def test_a_rank_beyond_the_layers(house: House) -> None:
    spec = house.spec(rank="rank = 512")
    [(level, line, key, message)] = told(house, spec)
    assert (level, line, key) == ("warning", line_of(spec, "rank ="), "lora.rank")
    config = json.loads((PROJECT / "runner/bases/tiny/transformer/config.json").read_text())
    width = config["attention_head_dim"] * config["num_attention_heads"]
    layers = (
        4 * config["num_layers"] + 3 * config["num_single_layers"]
    )  # to_q, to_k, to_v, and to_out.0 of double blocks
    assert message == (
        f"more than {layers} of {layers} layers can use, the narrowest of which is {width} wide (found 512): the rest costs memory "
        f"and learns nothing; lower it to {width}"
    )
    assert told(house, house.spec("b", rank=f"rank = {width}")) == []


def test_patience_that_is_shorter_than_a_look(house: House) -> None:
    ending = "every = 2\n[stop]\nno_better_for = {}"
    spec = house.spec(every=ending.format(1), prompts="prompts = []\nevery = 2")
    assert told(house, spec) == [
        (
            "warning",
            line_of(spec, "no_better_for"),
            "stop.no_better_for",
            "shorter than validate.every, so the first eval loss that is no better ends the training (found 1, validate.every is 2); "
            "set it to several times that, e.g. 6, or lower validate.every",
        )
    ]
    assert told(house, house.spec("b", every=ending.format(4), prompts="prompts = []\nevery = 2")) == []
    late = house.spec("c", every=ending.format(9), prompts="prompts = []\nevery = 6")
    assert told(house, late) == [
        (
            "warning",
            line_of(late, "no_better_for"),
            "stop.no_better_for",
            "no eval loss is computed before the end of the run (validate.every is 6, the run has 6 steps), so it never ends early; "
            "lower validate.every",
        )
    ]


# ---- whom to tell --------------------------------------------------------------------------------------------------

SHOWN = (
    "anyone who has this address can use it, and it is written in the spec, which is copied into the run's folder (not shown); "
    'put it into the environment and write url = "$NAME"'
)


def telling(house: House, line: str, name: str = "a") -> Path:
    return house.spec(name, every=f"every = 2\n[notify]\n{line}")


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("https://discord.com/api/webhooks/123/s3cret", True),
        ("https://canary.discord.com/api/webhooks/123/s3cret", True),
        ("https://hooks.slack.com/services/T0/B0/s3cret", True),
        ("https://api.telegram.org/bot123:s3cret/sendMessage", True),
        ("https://contoso.webhook.office.com/webhookb2/s3cret", True),
        ("https://ntfy.sh/s3cret", True),
        ("https://me:s3cret@example.org/hook", True),
        ("https://example.org/hook?token=s3cret", True),
        ("https://example.org/hook", False),
        ("https://discord.com.example.org/api/webhooks/1/2", False),
        ("$HOOK", False),
        ("https://hooks.slack.com/$HOOK", False),
        ("https://discord.com/api/webhooks/${HOOK}", False),
        ("https://example.org/hook?token=$HOOK", False),
    ],
)
def test_an_address_that_is_a_secret(house: House, monkeypatch: pytest.MonkeyPatch, url: str, secret: bool) -> None:
    monkeypatch.setenv("HOOK", "https://example.org/hidden-s3cret" if url == "$HOOK" else "hidden-s3cret")
    spec = telling(house, f'url = "{url}"')
    said = house.fluxrun("check", spec)
    assert said.code == 0  # old specs go on working
    assert (f"warning: {spec}:{line_of(spec, 'url')}: notify.url: {SHOWN}\n" in said.out) is secret
    assert "s3cret" not in said.out + said.err


def test_a_secret_is_not_passed_on_with_the_run(house: House) -> None:
    hook = "http://me:s3cret@127.0.0.1:9/hook"
    spec = house.spec(steps="steps = 2", prompts="prompts = []", every=f'every = 2\n[notify]\nurl = "{hook}"')
    said = house.fluxrun("queue", spec)
    assert said.code == 0
    assert "notify.url: anyone who has this address can use it" in said.err
    runs = house.folder / "runs"
    passed_on = [*(runs / "a" / "export").iterdir(), runs / "index.html", runs / "index.jsonl"]
    assert len(passed_on) > 5
    assert not [path.name for path in passed_on if path.is_file() and b"s3cret" in path.read_bytes()]
    with safe_open(runs / "a" / "export" / "a.safetensors", "pt") as file:
        assert "s3cret" not in json.dumps(file.metadata())
    assert "s3cret" not in said.err + house.fluxrun("results", "--csv").out


def test_variables_that_are_not_set_are_named_and_the_others_not_shown(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", "s3cret$")
    spec = telling(house, 'url = "https://x.org/$HOOK/$NOT_SET/${NOR_THIS}"')
    for command in ("check", "queue"):
        said = house.fluxrun(command, spec)
        assert said.code == 2
        assert (
            "notify.url: the environment has no such variable (found $NOT_SET, $NOR_THIS); set it"
            in said.out + said.err
        )
        assert "s3cret" not in said.out + said.err


# ---- what queue refuses --------------------------------------------------------------------------------------------


def test_check_takes_what_queue_takes(house: House) -> None:
    specs = telling(house, 'command = "touch ran"'), telling(house, 'command = "curl https://ntfy.sh/s3cret"', "b")
    faults = [
        f"{spec}:{line_of(spec, 'command')}: notify.command: this spec asks for a command (found {found!r}); add "
        "--allow-commands, or take it out\n"
        for spec, found in zip(specs, ("touch ran", "curl (an address)"), strict=True)
    ]
    checked, queued = house.fluxrun("check", *specs), house.fluxrun("queue", *specs)
    assert (checked.code, queued.code) == (2, 2)
    assert all(f"error: {fault}" in checked.out for fault in faults)
    assert queued.err == "".join(faults) + "2 faults; nothing was started\n"
    allowed = house.fluxrun("check", *specs, "--allow-commands")
    assert allowed.code == 0
    assert "let the command read it from the environment or a file" in allowed.out
    assert not (house.folder / "ran").exists()

    changed = house.fluxrun("check", house.spec("c"), "--slots", "2", "--gpus", "0")
    assert changed.code == 2
    assert "error: --gpus: every GPU is one slot; --slots is for --gpus cpu" in changed.out


def test_check_takes_fresh(done: House, tmp_path: Path) -> None:
    text = (done.folder / "a.toml").read_text().replace("rank = 4", "rank = 8")
    other = tmp_path / "a.toml"
    other.write_text(text.replace('"pictures"', f'"{done.folder / "pictures"}"'))
    refused = done.fluxrun("check", other)
    assert refused.code == 2
    assert "runs/a holds another run" in refused.out
    assert done.fluxrun("check", other, "--fresh").code == 0


def test_a_runs_folder_that_cannot_be_made(house: House) -> None:
    spec = house.spec()
    runs = house.write("file", "") / "runs"
    for command in ("plan", "check", "queue"):
        said = house.fluxrun(command, spec, "--runs", runs)
        assert said.code == 2
        assert (
            f"Invalid value for '--runs': {runs} cannot be made: {runs.parent} is a file; name another folder"
            in said.err
        )


def test_a_run_that_another_queue_has(house: House) -> None:
    from runner.jobs.prepare import prepare_jobs

    spec = house.spec()
    [job] = prepare_jobs([spec], house.folder / "runs", fetch=False, fresh=False)
    claim_run(job.run, job.spec, job.plan, "0", job.source.origin)
    [(level, _, key, message)] = told(house, spec)
    assert (level, key) == ("warning", "name")
    assert message.startswith("process ")
    assert message.endswith("runs/a; wait for it, or stop it; a queue leaves this run out")
    job.run.release()
    assert told(house, spec) == []
