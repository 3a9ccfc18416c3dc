"""The reference script's command lines as specs."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.newspec.diffusers_flags import KNOWN_FLAGS
from runner.newspec.from_diffusers import draft_text, read_command
from runner.newspec.shell_command import CommandError
from runner.spec.loader import load
from runner.spec.schema import dump
from tests.support.house import House
from tests.support.paths import PROJECT

EXAMPLE = r"""
export MODEL_NAME="black-forest-labs/FLUX.1-dev"
export DATASET_NAME="./3d_icon"
export OUTPUT_DIR="3d-icon-Flux-LoRA"

accelerate launch train_dreambooth_lora_flux_advanced.py \
  --pretrained_model_name_or_path=$MODEL_NAME \
  --dataset_name=$DATASET_NAME \
  --instance_prompt="3d icon in the style of TOK" \
  --output_dir=${OUTPUT_DIR} \
  --caption_column="prompt" \
  --mixed_precision="bf16" \
  --resolution=1024 \
  --train_batch_size=1 \
  --repeats=1 \
  --report_to="wandb"\
  --gradient_accumulation_steps=1 \
  --gradient_checkpointing \
  --learning_rate=1.0 \
  --text_encoder_lr=1.0 \
  --optimizer="prodigy"\
  --train_text_encoder_ti\
  @@
  --train_text_encoder_ti_frac=0.5\
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --rank=8 \
  --max_train_steps=700 \
  --checkpointing_steps=2000 \
  --seed="0" \
  --push_to_hub
"""
ICONS = {  # of the seed document: what its three examples differ in
    "flux-dev-3d-icon": "",
    "flux-dev-3d-icon-t5": "--enable_t5_ti \\",
    "flux-dev-3d-icon-inversion": "--enable_t5_ti --train_transformer_frac=0 \\",
}


@pytest.mark.parametrize("name", ICONS)
def test_the_example_commands_become_the_shipped_specs(house: House, name: str) -> None:
    command = EXAMPLE.replace("  @@\n", f"  {ICONS[name]}\n" if ICONS[name] else "")
    (house.folder / "3d_icon").mkdir()
    for path in (house.folder / "pictures").glob("*.png"):
        (house.folder / "3d_icon" / path.name).write_bytes(path.read_bytes())
    said = house.fluxrun("new", "a.toml", "--from-command", command)
    assert said.code == 0, said.err
    text = (house.folder / "a.toml").read_text()
    assert "# --checkpoints_total_limit: not given" in text
    (house.folder / "a.toml").write_text(text.replace('caption_column = "prompt"\n', ""))  # of the hub's data set
    planned = house.fluxrun("plan", "a.toml")
    assert planned.code == 0, planned.err
    converted, shipped = (
        dump(load([path])[0].spec) for path in (house.folder / "a.toml", PROJECT / "specs" / f"{name}.toml")
    )
    for tables in (converted, shipped):
        tables.pop("name")
        for key in ("source", "caption_column"):
            tables["data"].pop(key, None)
        tables.pop("track")  # W&B and the hub want a login, so the shipped specs leave them out
        tables.pop("hub")
    assert converted == shipped


FULL = """accelerate launch --num_processes 2 --dynamo_backend inductor --config_file x.yaml train_dreambooth_lora_flux_advanced.py
 --pretrained_model_name_or_path base --revision main --variant fp16 --instance_data_dir pictures --image_column img
 --dataset_config_name small --instance_prompt 'a TOK and a BOB' --token_abstraction 'TOK,BOB' --initializer_concept 'red dog'
 --num_new_tokens_per_abstraction 3 --max_sequence_length 128 --validation_prompt 'a TOK' --num_validation_images 2
 --validation_epochs 3 --rank 6 --lora_alpha 12 --lora_dropout 0.1 --with_prior_preservation --class_data_dir dogs
 --class_prompt 'a dog' --prior_loss_weight 0.5 --num_class_images 7 --sample_batch_size 2 --prior_generation_precision fp16
 --output_dir out/run/ --seed 3 --resolution 768 --center_crop --random_flip --train_text_encoder_ti
 --train_text_encoder_ti_frac 0.25 --train_transformer_frac 0.75 --num_train_epochs 4 --checkpoints_total_limit 5
 --resume_from_checkpoint latest --gradient_accumulation_steps 3 --text_encoder_lr 2e-4 --learning_rate 3e-4 --guidance_scale 1
 --scale_lr --lr_scheduler polynomial --lr_warmup_steps 10 --lr_power 2 --dataloader_num_workers 4
 --weighting_scheme logit_normal --logit_mean 0.1 --logit_std 0.9 --optimizer AdamW --use_8bit_adam --adam_beta1 0.8
 --adam_beta2 0.9 --adam_weight_decay 1e-2 --adam_weight_decay_text_encoder 1e-1 --adam_epsilon 1e-6 --max_grad_norm 2
 --lora_blocks 'attn.to_k, attn.to_q' --hub_model_id me/it --hub_token hf_secret --logging_dir logs --allow_tf32
 --cache_latents --report_to all --mixed_precision no --upcast_before_saving --image_interpolation_mode bicubic"""


def test_every_flag_becomes_a_key_or_a_note(tmp_path: Path) -> None:
    text = draft_text(read_command(FULL.replace("\n", " \\\n"), {}))
    (tmp_path / "a.toml").write_text(text)
    spec = load([tmp_path / "a.toml"])[0].spec
    found = dump(spec)
    assert found["name"] == "run"
    assert found["compute"] == {"gpus": 2}
    assert (found["model"]["compile"], found["model"]["dtype"], found["model"]["tf32"]) == (True, "fp32", True)
    assert [token["initializer"] for token in found["tokens"]] == ["red dog", "red dog"]
    assert [token["name"] for token in found["tokens"]] == ["TOK", "BOB"]
    assert found["prior"] == {
        "images": "dogs", "prompt": "a dog", "count": 7, "weight": 0.5, "dtype": "fp16", "batch_size": 2,
    }  # fmt: skip
    assert found["inversion"]["lr"] == 2e-4
    assert (found["lora"]["rank"], found["lora"]["alpha"], found["lora"]["layers"]) == (
        6,
        12,
        ["attn.to_k", "attn.to_q"],
    )
    assert found["train"]["weighting"] == {"scheme": "logit_normal", "mean": 0.1, "std": 0.9}
    assert found["optimizer"] == {"name": "adamw8bit", "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 1e-2}
    assert found["schedule"] == {"name": "polynomial", "warmup": 10, "cycles": 1, "power": 2.0}
    assert found["track"]["to"] == ["tensorboard", "wandb"]
    assert found["data"]["interpolation"] == "bicubic"
    assert "hf_secret" not in text
    for said in (
        "--hub_token: a spec must not contain secrets",
        "--lora_blocks",
        "--cache_latents",
        "--validation_epochs",
        "accelerate --config_file",
    ):
        assert f"# {said}" in text


SCRIPT_FLAGS = """
pretrained_model_name_or_path revision variant dataset_name dataset_config_name instance_data_dir cache_dir image_column
caption_column repeats class_data_dir instance_prompt token_abstraction num_new_tokens_per_abstraction initializer_concept
class_prompt max_sequence_length validation_prompt num_validation_images validation_epochs rank lora_alpha lora_dropout
with_prior_preservation prior_loss_weight num_class_images output_dir seed resolution center_crop random_flip
train_text_encoder train_text_encoder_ti enable_t5_ti train_text_encoder_ti_frac train_text_encoder_frac
train_transformer_frac train_batch_size sample_batch_size num_train_epochs max_train_steps checkpointing_steps
checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
guidance_scale text_encoder_lr scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers
weighting_scheme logit_mean logit_std mode_scale optimizer use_8bit_adam adam_beta1 adam_beta2 prodigy_beta3
prodigy_decouple adam_weight_decay adam_weight_decay_text_encoder lora_layers adam_epsilon prodigy_use_bias_correction
prodigy_safeguard_warmup max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32 cache_latents report_to
mixed_precision upcast_before_saving prior_generation_precision local_rank image_interpolation_mode
"""


def test_all_flags_of_the_script_are_known() -> None:
    assert {*SCRIPT_FLAGS.split(), "lora_blocks"} == KNOWN_FLAGS


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("accelerate launch", "no script in the command"),
        ("python train_sdxl.py --rank 4", "expected train_dreambooth_lora_flux_advanced.py, got train_sdxl.py"),
        ("python train_flux.py --dataset_name=$WHERE", "variables without a value: WHERE"),
        (
            "python train_flux.py --rnak 4 --dataset_name x",
            r"expected flags of the script, got --rnak \(did you mean --rank\?\)",
        ),
        ("python train_flux.py --rank four --dataset_name x", "--rank: expected a whole number, got 'four'"),
        (
            "python train_flux.py --max_train_steps many --dataset_name x",
            "--max_train_steps: expected a whole number, got 'many'",
        ),
        (
            "python train_flux.py --optimizer prodigy --prodigy_beta3 x --dataset_name x",
            "--prodigy_beta3: expected a number, got 'x'",
        ),
        (
            "accelerate launch --num_processes all train_flux.py --dataset_name x",
            "--num_processes: expected a whole number, got 'all'",
        ),
        ("python train_flux.py --rank 4", "neither --dataset_name nor --instance_data_dir"),
        ("python train_flux.py 'oops", "not a shell command"),
    ],
)
def test_commands_that_cannot_be_read_are_refused(command: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        read_command(command, {})
