"""`fluxrun new --from-command`: a command line of train_dreambooth_lora_flux_advanced.py as a spec.

The script's flags and defaults are those of diffusers' examples/advanced_diffusion_training of August 2026. Where its
defaults are not ours they are written out, so that the spec trains what the command would have trained.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runner.newspec.diffusers_flags import (
    DEFAULTS,
    DIRECT,
    INTERPOLATIONS,
    LAUNCH_SWITCHES,
    LAYER_PRESETS,
    NO_COUNTERPART,
    TABLE_ORDER,
    Number,
)
from runner.newspec.shell_command import CommandError, parse_command
from runner.newspec.template_tables import DEFAULT_BASE
from runner.spec.run_names import to_run_name
from runner.spec.toml_text import toml_line


@dataclass
class SpecDraft:
    """The spec that a command of `script` becomes. values: by dotted key; notes: (flag, reason) for what could not be
    carried over."""

    script: str
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def note(self, flag: str, reason: str) -> None:
        self.notes.append((flag, reason))


def read_command(command: str, environment: Mapping[str, str] | None = None) -> SpecDraft:
    """environment: variables that the command may use; os.environ if not given. Raises CommandError."""
    parsed = parse_command(command, os.environ if environment is None else environment)
    draft = SpecDraft(parsed.script)
    _translate_launcher(draft, parsed.launcher)
    _translate_flags(draft, parsed.flags)
    return draft


def draft_text(draft: SpecDraft) -> str:
    """TOML, with the notes as comments."""
    tables: dict[str, list[str]] = {"": []}
    for key, value in draft.values.items():
        table, _, name = key.rpartition(".")
        if key != "tokens":
            tables.setdefault(table, []).append(toml_line(name, value))
    lines = [
        f"# From a command line of {draft.script.rsplit('/', 1)[-1]}, by `fluxrun new FILE --from-command COMMAND`."
    ]
    lines += [f"# {flag}: {reason}." for flag, reason in draft.notes]
    lines += ["", *tables.pop("")]
    for table in sorted(tables, key=TABLE_ORDER.index):
        if table == "lora":
            for token in draft.values.get("tokens", []):
                lines += ["", "[[tokens]]", *(toml_line(name, value) for name, value in token.items())]
        lines += ["", f"[{table}]", *tables[table]]
    return "\n".join(lines) + "\n"


# ---- translating ---------------------------------------------------------------------------------------------------


def _translate_launcher(draft: SpecDraft, words: list[str]) -> None:
    """The options of `accelerate launch`."""
    options = [word for word in words if word not in ("accelerate", "launch", "python", "python3", "-m")]
    index = 0
    while index < len(options):
        name, equals, value = options[index].removeprefix("--").partition("=")
        index += 1
        if not equals and name not in LAUNCH_SWITCHES and index < len(options) and not options[index].startswith("--"):
            value, index = options[index], index + 1
        if name == "num_processes":
            draft.values["compute.gpus"] = _converted("num_processes", value, int)
        elif name == "mixed_precision":
            draft.values["model.dtype"] = "fp32" if value == "no" else value
        elif name == "dynamo_backend":
            draft.values["model.compile"] = value.lower() != "no"
        elif name in ("gpu_ids", "cpu"):
            draft.note(f"accelerate --{name}", "choose devices when queueing: `fluxrun queue SPEC --gpus 0,1`")
        else:
            draft.note(f"accelerate --{name}", "fluxrun starts its own processes")


def _translate_flags(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    with_defaults = {**DEFAULTS, **flags}
    for name, (key, kind) in DIRECT.items():
        if name in with_defaults:
            draft.values[key] = _converted(name, with_defaults[name], kind)
    for name, reason in NO_COUNTERPART.items():
        if name in flags:
            draft.note(f"--{name}", reason)
    folder = flags.get("output_dir", "flux-dreambooth-lora").rstrip("/").split("/")[-1]
    draft.values["name"] = to_run_name(folder)
    if "model.base" not in draft.values:
        draft.values["model.base"] = DEFAULT_BASE
        draft.note(
            "--pretrained_model_name_or_path", f"not given, though the script requires it; {DEFAULT_BASE} is used"
        )
    _data(draft, flags)
    _prior(draft, flags)
    _text_encoders(draft, flags)
    _layers(draft, flags)
    _length(draft, flags)
    _weighting(draft, flags)
    _optimizer(draft, flags)
    _schedule(draft, flags)
    _precision(draft, flags)
    _checkpoints(draft, flags)
    _validation(draft, flags)
    _trackers(draft, flags)


def _converted(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        return text.lower() not in ("false", "0", "no")
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise CommandError(f"--{name}: expected {wanted}, got {text!r}") from None


def _number(flags: Mapping[str, str], flag: str, default: Number) -> Number:
    value: Number = _converted(flag, flags[flag], type(default)) if flag in flags else default
    return value


def _data(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    source = flags.get("instance_data_dir") or flags.get("dataset_name")
    if not source:
        raise CommandError("neither --dataset_name nor --instance_data_dir is given; add one")
    draft.values["data.source"] = source
    interpolation = flags.get("image_interpolation_mode", "lanczos")
    if interpolation in INTERPOLATIONS:
        draft.values["data.interpolation"] = interpolation
    else:
        draft.note("--image_interpolation_mode", f"{interpolation} is not known; lanczos is used")


def _prior(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    if "with_prior_preservation" not in flags:
        return
    if not flags.get("class_prompt"):
        raise CommandError("--with_prior_preservation needs a --class_prompt, as in the script; add it")
    draft.values |= {
        "prior.images": flags.get("class_data_dir", "class-images"),
        "prior.prompt": flags["class_prompt"],
        "prior.count": _number(flags, "num_class_images", 100),
        "prior.weight": _number(flags, "prior_loss_weight", 1.0),
        "prior.batch_size": _number(flags, "sample_batch_size", 4),
    }
    if (precision := flags.get("prior_generation_precision", "no")) != "no":
        draft.values["prior.dtype"] = precision


def _text_encoders(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    values = draft.values
    rate = _number(flags, "text_encoder_lr", 5e-6)
    if flags.get("optimizer", "adamw").lower() == "prodigy" and rate != _number(flags, "learning_rate", 1e-4):
        draft.note("--text_encoder_lr", "Prodigy has one learning rate; the script overwrites this one silently")
        rate = _number(flags, "learning_rate", 1e-4)
    if "train_text_encoder_ti" in flags:
        values["tokens"] = _tokens(draft, flags)
        values["inversion.encoders"] = ["clip", "t5"] if "enable_t5_ti" in flags else ["clip"]
        values["inversion.until"] = _number(flags, "train_text_encoder_ti_frac", 0.5)
        values["inversion.lr"] = rate
        values["inversion.weight_decay"] = _number(flags, "adam_weight_decay_text_encoder", 1e-3)
    elif "train_text_encoder" in flags:
        values["text_lora.rank"] = _number(flags, "rank", 4)
        values["text_lora.alpha"] = _number(flags, "lora_alpha", 4.0)
        values["text_lora.until"] = _number(flags, "train_text_encoder_frac", 1.0)
        values["text_lora.lr"] = rate


def _tokens(draft: SpecDraft, flags: Mapping[str, str]) -> list[dict[str, Any]]:
    initializer = {}
    if "initializer_concept" in flags:
        initializer = {"initializer": flags["initializer_concept"]}
        reason = "the script learns as many vectors as the phrase has tokens: set tokens.vectors"
        draft.note("--initializer_concept", reason)
    return [
        {"name": name.strip(), "vectors": _number(flags, "num_new_tokens_per_abstraction", 2), **initializer}
        for name in re.split(r",\s*", flags.get("token_abstraction", "TOK"))
    ]


def _layers(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    names = flags.get("lora_layers") or flags.get("lora_blocks")
    if "lora_blocks" in flags:
        draft.note("--lora_blocks", "the script has no such flag; read as --lora_layers, as its README means it")
    if not names:
        draft.values["lora.layers"] = "attention+mlp"  # the script's default list
        return
    layers = [layer.strip() for layer in names.split(",")]
    draft.values["lora.layers"] = LAYER_PRESETS.get(",".join(layers), layers)


def _length(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    if "max_train_steps" in flags:
        draft.values["train.steps"] = _converted("max_train_steps", flags["max_train_steps"], int)
    else:
        draft.values["train.epochs"] = _number(flags, "num_train_epochs", 1)


def _weighting(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    scheme = flags.get("weighting_scheme", "none")
    if scheme != "none":
        draft.values["train.weighting.scheme"] = scheme
    if scheme == "logit_normal":
        draft.values["train.weighting.mean"] = _number(flags, "logit_mean", 0.0)
        draft.values["train.weighting.std"] = _number(flags, "logit_std", 1.0)
    if scheme == "mode":
        draft.values["train.weighting.scale"] = _number(flags, "mode_scale", 1.29)


def _optimizer(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    name = flags.get("optimizer", "adamw").lower()
    if name not in ("adamw", "prodigy"):
        draft.note("--optimizer", f"{name} is not known; AdamW is used, as the script does with a warning")
        name = "adamw"
    if name == "adamw" and "use_8bit_adam" in flags:
        name = "adamw8bit"
    draft.values["optimizer.name"] = name
    numbers = {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_weight_decay": "weight_decay", "adam_epsilon": "eps"}
    for flag, key in numbers.items():
        if flag in flags:
            draft.values[f"optimizer.{key}"] = _converted(flag, flags[flag], float)
    if name == "prodigy":
        _prodigy(draft, flags)


def _prodigy(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    safeguard = flags.get("prodigy_safeguard_warmup", "True")
    draft.values["optimizer.safeguard_warmup"] = _converted("prodigy_safeguard_warmup", safeguard, bool)
    if "prodigy_beta3" in flags:
        draft.values["optimizer.beta3"] = _converted("prodigy_beta3", flags["prodigy_beta3"], float)
    for flag, key in (("prodigy_decouple", "decouple"), ("prodigy_use_bias_correction", "bias_correction")):
        if flag in flags:
            draft.values[f"optimizer.{key}"] = _converted(flag, flags[flag], bool)


def _schedule(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    name = flags.get("lr_scheduler", "constant")
    warmup = _number(flags, "lr_warmup_steps", 500)
    if name != "constant":
        steps = draft.values.get("train.steps", warmup)
        draft.values["schedule.warmup"] = min(warmup, steps)
        if warmup > steps:
            shown = warmup if "lr_warmup_steps" in flags else f"{warmup}, the script's default,"
            draft.note("--lr_warmup_steps", f"{shown} is longer than the run; schedule.warmup is its {steps} steps")
    elif warmup and "lr_warmup_steps" in flags:
        draft.note("--lr_warmup_steps", "the constant schedule has no warm-up; use constant_with_warmup")
    if name == "cosine_with_restarts":
        draft.values["schedule.cycles"] = _number(flags, "lr_num_cycles", 1)
    if name == "polynomial":
        draft.values["schedule.power"] = _number(flags, "lr_power", 1.0)


def _precision(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    if "mixed_precision" in flags:
        draft.values["model.dtype"] = "fp32" if flags["mixed_precision"] == "no" else flags["mixed_precision"]
    draft.values["model.tf32"] = "allow_tf32" in flags


def _checkpoints(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    if "checkpoints_total_limit" in flags:
        limit = _converted("checkpoints_total_limit", flags["checkpoints_total_limit"], int)
        draft.values["checkpoint.keep"] = max(1, limit)
    else:
        reason = "not given: the script keeps every checkpoint; here checkpoint.keep is the number kept"
        draft.note("--checkpoints_total_limit", reason)


def _validation(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    if "validation_prompt" in flags:
        draft.values["validate.prompts"] = [flags["validation_prompt"]]
        draft.values["validate.count"] = _number(flags, "num_validation_images", 4)
        draft.note("--validation_epochs", "pictures are drawn every number of steps here: set validate.every")


def _trackers(draft: SpecDraft, flags: Mapping[str, str]) -> None:
    asked = flags.get("report_to", "tensorboard")
    names = ["tensorboard", "wandb"] if asked == "all" else asked.split(",")
    trackers = [name for name in names if name in ("tensorboard", "wandb")]
    if not trackers and asked != "none":
        draft.note("--report_to", f"{asked} is not known; TensorBoard and W&B are")
    draft.values["track.to"] = trackers
