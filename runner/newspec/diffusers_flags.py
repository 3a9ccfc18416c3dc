"""The flags of train_dreambooth_lora_flux_advanced.py and the spec keys that they become."""

from __future__ import annotations

from typing import TypeVar

Number = TypeVar("Number", int, float)

SWITCHES = {
    "with_prior_preservation", "center_crop", "random_flip", "train_text_encoder", "train_text_encoder_ti", "enable_t5_ti",
    "gradient_checkpointing", "scale_lr", "use_8bit_adam", "push_to_hub", "allow_tf32", "cache_latents",
    "upcast_before_saving",
}  # fmt: skip

# flag -> (key, type): what needs no thought. Spec keys in the order in which they are written.
PLAIN: dict[str, tuple[str, type]] = {
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
DEFAULTS = {  # the script's, where ours differ
    "rank": "4",
    "lora_alpha": "4",
    "train_batch_size": "4",
    "checkpointing_steps": "500",
}
LAYERS = {  # the script's own default is the preset's list, less the single blocks' own way of naming
    "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0": "attention",
}
NO_COUNTERPART = {
    "cache_dir": "the hub's cache is where HF_HOME says",
    "resume_from_checkpoint": "the same `fluxrun queue` command always goes on from the last checkpoint",
    "cache_latents": "latents are always cached, by content",
    "upcast_before_saving": "what is trained is kept in fp32 and saved so",
    "local_rank": "set by launchers only",
    "logging_dir": "events lie in the run folder",
    "hub_token": "no secret may stand in a spec; use HF_TOKEN or `hf auth login`",
    "output_dir": "its last part is the run's name; runs lie in the --runs folder",
}
LAUNCH_SWITCHES = {"multi_gpu", "cpu", "quiet", "main_training_function", "debug", "use_deepspeed", "use_fsdp"}


ORDER = [
    "model", "data", "prior", "lora", "inversion", "text_lora", "train", "train.weighting", "optimizer", "schedule",
    "checkpoint", "validate", "track", "export", "hub", "compute",
]  # fmt: skip
