"""The flags of train_dreambooth_lora_flux_advanced.py and the spec keys that they become."""

from __future__ import annotations

from typing import TypeVar

Number = TypeVar("Number", int, float)

SWITCHES = {
    "with_prior_preservation", "center_crop", "random_flip", "train_text_encoder", "train_text_encoder_ti", "enable_t5_ti",
    "gradient_checkpointing", "scale_lr", "use_8bit_adam", "push_to_hub", "allow_tf32", "cache_latents",
    "upcast_before_saving",
}  # fmt: skip

# flag -> (key, type) where the value is the same. In the order in which the keys are written.
DIRECT: dict[str, tuple[str, type]] = {
    "seed": ("seed", int),
    "pretrained_model_name_or_path": ("model.base", str),
    "revision": ("model.revision", str),
    "variant": ("model.variant", str),
    "gradient_checkpointing": ("model.gradient_checkpointing", bool),
    "max_sequence_length": ("model.max_sequence_length", int),
    "dataset_config_name": ("data.config", str),
    "image_column": ("data.image_column", str),
    "caption_column": ("data.caption_column", str),
    "instance_prompt": ("data.prompt", str),
    "repeats": ("data.repeats", int),
    "resolution": ("data.resolution", int),
    "center_crop": ("data.center_crop", bool),
    "random_flip": ("data.random_flip", bool),
    "dataloader_num_workers": ("data.workers", int),
    "rank": ("lora.rank", int),
    "lora_alpha": ("lora.alpha", float),
    "lora_dropout": ("lora.dropout", float),
    "train_transformer_frac": ("lora.until", float),
    "train_batch_size": ("train.batch_size", int),
    "gradient_accumulation_steps": ("train.accumulate", int),
    "learning_rate": ("train.lr", float),
    "scale_lr": ("train.scale_lr", bool),
    "guidance_scale": ("train.guidance", float),
    "max_grad_norm": ("train.max_grad_norm", float),
    "lr_scheduler": ("schedule.name", str),
    "checkpointing_steps": ("checkpoint.every", int),
    "push_to_hub": ("hub.push", bool),
    "hub_model_id": ("hub.repo", str),
}
TRANSLATED = {  # flags that take more than that
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
DEFAULTS = {  # the script's, where ours differ
    "rank": "4",
    "lora_alpha": "4",
    "train_batch_size": "4",
    "checkpointing_steps": "500",
}
LAYER_PRESETS = {  # --lora_layers that equal a preset
    "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0": "attention",
}
NO_COUNTERPART = {
    "cache_dir": "the hub's cache is in HF_HOME",
    "resume_from_checkpoint": "the same `fluxrun queue` command always resumes from the last checkpoint",
    "cache_latents": "latents are always cached, by content",
    "upcast_before_saving": "trained weights are kept and saved in fp32",
    "local_rank": "launchers set it",
    "logging_dir": "events are written into the run folder",
    "hub_token": "a spec must not contain secrets; use HF_TOKEN or `hf auth login`",
    "output_dir": "its last part is the run's name; runs are in the --runs folder",
}
KNOWN_FLAGS = SWITCHES | DIRECT.keys() | TRANSLATED | NO_COUNTERPART.keys()
INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest")
LAUNCH_SWITCHES = {"multi_gpu", "cpu", "quiet", "main_training_function", "debug", "use_deepspeed", "use_fsdp"}

TABLE_ORDER = [
    "model", "data", "prior", "lora", "inversion", "text_lora", "train", "train.weighting", "optimizer", "schedule",
    "checkpoint", "validate", "track", "export", "hub", "compute",
]  # fmt: skip
