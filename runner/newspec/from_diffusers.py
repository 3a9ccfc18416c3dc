"""`fluxrun new --from-command`: a command line of train_dreambooth_lora_flux_advanced.py as a spec.

The script's flags and defaults are diffusers' (examples/advanced_diffusion_training, August 2026). Where its defaults
are not ours they are written out, so that the spec trains what the command would have trained.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runner.newspec.diffusers_flags import (
    DEFAULTS,
    LAUNCH_SWITCHES,
    LAYERS,
    NO_COUNTERPART,
    ORDER,
    PLAIN,
    SWITCHES,
    Number,
)
from runner.newspec.template import DEFAULT_BASE
from runner.spec.run_names import to_run_name
from runner.spec.toml_text import toml_line


class CommandError(Exception):
    """The command line cannot be read; the message says why."""


@dataclass
class Draft:
    """The spec to be, of a command line of `script`: values by dotted key, and what could not be carried over, as (flag,
    reason)."""

    script: str
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)


def spec_from_command(command: str, environment: Mapping[str, str] | None = None) -> str:
    """TOML text. Raises CommandError for what is no such command line, with every unknown flag."""
    return written(draft_of(command, environment))


def draft_of(command: str, environment: Mapping[str, str] | None = None) -> Draft:
    """Raises CommandError."""
    launch, script, flags = _split(_words(command, os.environ if environment is None else environment))
    draft = Draft(script)
    _launch(draft, launch)
    _flags(draft, flags)
    return draft


# ---- reading -------------------------------------------------------------------------------------------------------


def _words(command: str, environment: Mapping[str, str]) -> list[str]:
    """Shell words with variables put in: those of `export NAME=...` lines in the text itself first."""
    joined = re.sub(r"\\\r?\n", " ", command)
    known = dict(environment)
    lines = []
    for line in joined.splitlines():
        given = re.fullmatch(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)", line)
        if given:
            known[given[1]] = "".join(shlex.split(given[2]))
        elif line.strip() and not line.strip().startswith("#"):
            lines.append(line)
    missing: list[str] = []

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in known:
            missing.append(name)
        return known.get(name, "")

    text = re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, "\n".join(lines))
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        raise CommandError(
            f"variables without a value: {names}; put `export NAME=...` lines before the command, or set them"
        )
    try:
        return shlex.split(text)
    except ValueError as error:
        raise CommandError(f"not a shell command ({error})") from error


def _split(words: list[str]) -> tuple[list[str], str, dict[str, str]]:
    """(launcher's words, script, the script's flags)."""
    at = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        raise CommandError("no script in the command (a word that ends in .py)")
    if "flux" not in words[at]:
        raise CommandError(f"expected train_dreambooth_lora_flux_advanced.py, got {words[at]}")
    flags: dict[str, str] = {}
    rest, unknown = words[at + 1 :], []
    index = 0
    while index < len(rest):
        name, equals, value = rest[index].removeprefix("--").partition("=")
        if not rest[index].startswith("--"):
            raise CommandError(f"expected a flag, got {rest[index]!r}")
        index += 1
        if name not in _known():
            unknown.append(name)
        if name in SWITCHES:
            value = "True"
        elif not equals and index < len(rest) and not rest[index].startswith("--"):
            value, index = rest[index], index + 1
        flags[name] = value
    if unknown:
        near = [f"--{name}{_near(name)}" for name in unknown]
        raise CommandError(f"expected flags of the script, got {', '.join(near)}")
    return words[:at], words[at], flags


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, sorted(_known()), 1)
    return f" (did you mean --{near[0]}?)" if near else ""


def _known() -> set[str]:
    thought = {
        "dataset_name", "instance_data_dir", "token_abstraction", "num_new_tokens_per_abstraction", "initializer_concept",
        "class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight", "prior_generation_precision",
        "sample_batch_size", "train_text_encoder_ti_frac", "train_text_encoder_frac", "text_encoder_lr",
        "adam_weight_decay_text_encoder", "lora_layers", "lora_blocks", "num_train_epochs", "max_train_steps",
        "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "optimizer", "adam_beta1", "adam_beta2",
        "adam_weight_decay", "adam_epsilon", "prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction",
        "prodigy_safeguard_warmup", "lr_warmup_steps", "lr_num_cycles", "lr_power", "checkpoints_total_limit",
        "validation_prompt", "validation_epochs", "num_validation_images", "mixed_precision", "report_to",
        "image_interpolation_mode",
    }  # fmt: skip
    return thought | set(PLAIN) | SWITCHES | set(NO_COUNTERPART)


# ---- translating ---------------------------------------------------------------------------------------------------


def _launch(draft: Draft, words: list[str]) -> None:
    options = [word for word in words if word not in ("accelerate", "launch", "python", "python3", "-m")]
    index = 0
    while index < len(options):
        name, equals, value = options[index].removeprefix("--").partition("=")
        index += 1
        if not equals and name not in LAUNCH_SWITCHES and index < len(options) and not options[index].startswith("--"):
            value, index = options[index], index + 1
        if name == "num_processes":
            draft.values["compute.gpus"] = _typed("num_processes", value, int)
        elif name == "mixed_precision":
            draft.values["model.dtype"] = "fp32" if value == "no" else value
        elif name == "dynamo_backend":
            draft.values["model.compile"] = value.lower() != "no"
        elif name in ("gpu_ids", "cpu"):
            draft.notes.append(
                (f"accelerate --{name}", "choose devices when queueing: `fluxrun queue SPEC --gpus 0,1`")
            )
        else:
            draft.notes.append((f"accelerate --{name}", "fluxrun starts its own processes"))


def _flags(draft: Draft, given: Mapping[str, str]) -> None:
    flags = {**DEFAULTS, **given}
    values = draft.values
    for name, (key, kind) in PLAIN.items():
        if name in flags:
            values[key] = _typed(name, flags[name], kind)
    for name, reason in NO_COUNTERPART.items():
        if name in given:
            draft.notes.append((f"--{name}", reason))
    folder = given.get("output_dir", "flux-dreambooth-lora").rstrip("/").split("/")[-1]
    values["name"] = to_run_name(folder)
    if "model.base" not in values:
        values["model.base"] = DEFAULT_BASE
        draft.notes.append(
            ("--pretrained_model_name_or_path", f"not given, though the script wants it; {DEFAULT_BASE} is taken")
        )
    _data(draft, given)
    _text(draft, given)
    _layers(draft, given)
    _length(draft, given)
    _optimizer(draft, given)
    _schedule(draft, given)
    _rest(draft, given)


def _typed(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        return text.lower() not in ("false", "0", "no")
    try:
        return kind(text)
    except ValueError:
        raise CommandError(
            f"--{name}: expected {'a whole number' if kind is int else 'a number'}, got {text!r}"
        ) from None


def _number(given: Mapping[str, str], flag: str, default: Number) -> Number:
    found: Number = _typed(flag, given[flag], type(default)) if flag in given else default
    return found


def _data(draft: Draft, given: Mapping[str, str]) -> None:
    source = given.get("instance_data_dir") or given.get("dataset_name")
    if not source:
        raise CommandError("neither --dataset_name nor --instance_data_dir is given; add one")
    draft.values["data.source"] = source
    draft.values["data.interpolation"] = given.get("image_interpolation_mode", "lanczos")
    if draft.values["data.interpolation"] not in ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"):
        draft.notes.append(
            ("--image_interpolation_mode", f"{draft.values.pop('data.interpolation')} is not known; lanczos is used")
        )
    if "with_prior_preservation" not in given:
        return
    if not given.get("class_prompt"):
        raise CommandError("--with_prior_preservation needs a --class_prompt, as in the script; add it")
    values = {
        "prior.images": given.get("class_data_dir", "class-images"),
        "prior.prompt": given["class_prompt"],
        "prior.count": _number(given, "num_class_images", 100),
        "prior.weight": _number(given, "prior_loss_weight", 1.0),
        "prior.batch_size": _number(given, "sample_batch_size", 4),
    }
    if (precision := given.get("prior_generation_precision", "no")) != "no":
        values["prior.dtype"] = precision
    draft.values |= values


def _text(draft: Draft, given: Mapping[str, str]) -> None:
    values = draft.values
    rate = _number(given, "text_encoder_lr", 5e-6)
    if given.get("optimizer", "adamw").lower() == "prodigy" and rate != _number(given, "learning_rate", 1e-4):
        draft.notes.append(
            ("--text_encoder_lr", "Prodigy has one learning rate; the script overwrites this one silently")
        )
        rate = _number(given, "learning_rate", 1e-4)
    if "train_text_encoder_ti" in given:
        tokens: list[dict[str, Any]] = []
        for name in re.split(r",\s*", given.get("token_abstraction", "TOK")):
            token: dict[str, Any] = {
                "name": name.strip(),
                "vectors": _number(given, "num_new_tokens_per_abstraction", 2),
            }
            if "initializer_concept" in given:
                token["initializer"] = given["initializer_concept"]
            tokens.append(token)
        if "initializer_concept" in given:
            draft.notes.append(
                (
                    "--initializer_concept",
                    "the script takes as many vectors as the phrase has pieces: set tokens.vectors",
                )
            )
        values["tokens"] = tokens
        values["inversion.encoders"] = ["clip", "t5"] if "enable_t5_ti" in given else ["clip"]
        values["inversion.until"] = _number(given, "train_text_encoder_ti_frac", 0.5)
        values["inversion.lr"] = rate
        values["inversion.weight_decay"] = _number(given, "adam_weight_decay_text_encoder", 1e-3)
    elif "train_text_encoder" in given:
        values["text_lora.rank"] = _number(given, "rank", 4)
        values["text_lora.alpha"] = _number(given, "lora_alpha", 4.0)
        values["text_lora.until"] = _number(given, "train_text_encoder_frac", 1.0)
        values["text_lora.lr"] = rate


def _layers(draft: Draft, given: Mapping[str, str]) -> None:
    written = given.get("lora_layers") or given.get("lora_blocks")
    if "lora_blocks" in given:
        draft.notes.append(
            ("--lora_blocks", "the script has no such flag; read as --lora_layers, as its README means it")
        )
    if not written:
        draft.values["lora.layers"] = "attention+mlp"  # the script's default list
        return
    layers = [layer.strip() for layer in written.split(",")]
    draft.values["lora.layers"] = LAYERS.get(",".join(layers), layers)


def _length(draft: Draft, given: Mapping[str, str]) -> None:
    if "max_train_steps" in given:
        draft.values["train.steps"] = _typed("max_train_steps", given["max_train_steps"], int)
    else:
        draft.values["train.epochs"] = _number(given, "num_train_epochs", 1)
    scheme = given.get("weighting_scheme", "none")
    if scheme != "none":
        draft.values["train.weighting.scheme"] = scheme
    if scheme == "logit_normal":
        draft.values["train.weighting.mean"] = _number(given, "logit_mean", 0.0)
        draft.values["train.weighting.std"] = _number(given, "logit_std", 1.0)
    if scheme == "mode":
        draft.values["train.weighting.scale"] = _number(given, "mode_scale", 1.29)


def _optimizer(draft: Draft, given: Mapping[str, str]) -> None:
    name = given.get("optimizer", "adamw").lower()
    values = draft.values
    if name not in ("adamw", "prodigy"):
        draft.notes.append(("--optimizer", f"{name} is not known, and the script would use AdamW, with a warning"))
        name = "adamw"
    if name == "adamw" and "use_8bit_adam" in given:
        name = "adamw8bit"
    values["optimizer.name"] = name
    for flag, key in (
        ("adam_beta1", "beta1"),
        ("adam_beta2", "beta2"),
        ("adam_weight_decay", "weight_decay"),
        ("adam_epsilon", "eps"),
    ):
        if flag in given:
            values[f"optimizer.{key}"] = _typed(flag, given[flag], float)
    if name == "prodigy":
        values["optimizer.safeguard_warmup"] = _typed("", given.get("prodigy_safeguard_warmup", "True"), bool)
        if "prodigy_beta3" in given:
            values["optimizer.beta3"] = _typed("prodigy_beta3", given["prodigy_beta3"], float)
        for flag, key in (("prodigy_decouple", "decouple"), ("prodigy_use_bias_correction", "bias_correction")):
            if flag in given:
                values[f"optimizer.{key}"] = _typed(flag, given[flag], bool)


def _schedule(draft: Draft, given: Mapping[str, str]) -> None:
    name = given.get("lr_scheduler", "constant")
    warmup = _number(given, "lr_warmup_steps", 500)
    if name != "constant":
        steps = draft.values.get("train.steps", warmup)
        draft.values["schedule.warmup"] = min(warmup, steps)
        if warmup > steps:
            told = f"{warmup}, the script's default," if "lr_warmup_steps" not in given else warmup
            draft.notes.append(
                ("--lr_warmup_steps", f"{told} is longer than the run; schedule.warmup is its {steps} steps")
            )
    elif warmup and "lr_warmup_steps" in given:
        draft.notes.append(("--lr_warmup_steps", "the constant schedule has no warm-up; use constant_with_warmup"))
    if name == "cosine_with_restarts":
        draft.values["schedule.cycles"] = _number(given, "lr_num_cycles", 1)
    if name == "polynomial":
        draft.values["schedule.power"] = _number(given, "lr_power", 1.0)


def _rest(draft: Draft, given: Mapping[str, str]) -> None:
    values = draft.values
    if "mixed_precision" in given:
        values["model.dtype"] = "fp32" if given["mixed_precision"] == "no" else given["mixed_precision"]
    values["model.tf32"] = "allow_tf32" in given
    if "checkpoints_total_limit" in given:
        values["checkpoint.keep"] = max(1, _typed("checkpoints_total_limit", given["checkpoints_total_limit"], int))
    else:
        draft.notes.append(
            ("--checkpoints_total_limit", "not given: the script keeps every checkpoint; checkpoint.keep says how many")
        )
    if "validation_prompt" in given:
        values["validate.prompts"] = [given["validation_prompt"]]
        values["validate.count"] = _number(given, "num_validation_images", 4)
        draft.notes.append(("--validation_epochs", "pictures come at steps here: set validate.every"))
    trackers = given.get("report_to", "tensorboard")
    chosen = (
        ["tensorboard", "wandb"]
        if trackers == "all"
        else [one for one in trackers.split(",") if one in ("tensorboard", "wandb")]
    )
    if not chosen and trackers != "none":
        draft.notes.append(("--report_to", f"{trackers} is not known; TensorBoard and W&B are"))
    values["track.to"] = chosen


# ---- writing -------------------------------------------------------------------------------------------------------


def written(draft: Draft) -> str:
    """TOML text."""
    script = draft.script
    tables: dict[str, list[str]] = {"": []}
    for key, value in draft.values.items():
        table, _, name = key.rpartition(".")
        if key != "tokens":
            tables.setdefault(table, []).append(toml_line(name, value))
    lines = [f"# From a command line of {script.rsplit('/', 1)[-1]}, by `fluxrun new FILE --from-command COMMAND`."]
    lines += [f"# {flag}: {reason}." for flag, reason in draft.notes]
    lines += ["", *tables.pop("")]
    for table in sorted(tables, key=ORDER.index):
        if table == "lora":
            for token in draft.values.get("tokens", []):
                lines += ["", "[[tokens]]", *(toml_line(name, value) for name, value in token.items())]
        lines += ["", f"[{table}]", *tables[table]]
    return "\n".join(lines) + "\n"
