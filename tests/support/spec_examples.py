"""Every key of a spec with another value than its default, and the tables it needs."""

from __future__ import annotations

import copy
from typing import Any

from runner.plan.phases import Facts

LEAST: dict[str, Any] = {
    "name": "a", "model": {"base": "builtin:tiny"}, "data": {"source": "pictures"}, "train": {"steps": 8},
}  # fmt: skip
TOKENS = {"tokens": [{"name": "TOK"}]}
PRIOR = {"prior": {"images": "classes", "prompt": "a thing"}}
TEXT_LORA = {"text_lora": {"rank": 4}}
PRODIGY = {"optimizer": {"name": "prodigy"}}
FACTS = Facts(("a TOK", "another TWO"), 8, "data", "base", None)
# Every key: another value than the default's, and the tables that the key needs beside it.
EXAMPLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "name": ("b", {}),
    "seed": (7, {}),
    "model.base": ("other/base", {}),
    "model.revision": ("v2", {}),
    "model.variant": ("fp16", {}),
    "model.dtype": ("bf16", {}),
    "model.quantize": ("int8", {}),
    "model.gradient_checkpointing": (True, {}),
    "model.attention": ("_native_math", {}),
    "model.offload": ("blocks", {}),
    "model.compile": (True, {}),
    "model.tf32": (False, {}),
    "model.max_sequence_length": (128, {}),
    "data.source": ("others", {}),
    "data.config": ("small", {}),
    "data.split": ("test", {}),
    "data.image_column": ("img", {}),
    "data.caption_column": ("text", {}),
    "data.prompt": ("a thing", {}),
    "data.repeats": (2, {}),
    "data.resolution": (64, {}),
    "data.buckets": (True, {}),
    "data.center_crop": (True, {}),
    "data.random_flip": (True, {}),
    "data.interpolation": ("bicubic", {}),
    "data.variants": (2, {}),
    "data.caption_dropout": (0.1, {}),
    "data.holdout": (2, {}),
    "data.workers": (3, {}),
    "prior.images": ("others", PRIOR),
    "prior.prompt": ("another thing", PRIOR),
    "prior.count": (5, PRIOR),
    "prior.weight": (0.5, PRIOR),
    "prior.dtype": ("bf16", PRIOR),
    "prior.batch_size": (2, PRIOR),
    "tokens.name": ("TWO", TOKENS),
    "tokens.vectors": (3, TOKENS),
    "tokens.placeholder": ("bird", TOKENS),
    "tokens.initializer": ("red heart", TOKENS),
    "inversion.encoders": (["clip", "t5"], TOKENS),
    "inversion.until": (0.25, TOKENS),
    "inversion.lr": (0.5, TOKENS),
    "inversion.weight_decay": (0.5, TOKENS),
    "inversion.pooling": ("eos", TOKENS),
    "inversion.gradient_checkpointing": (True, TOKENS),
    "lora.rank": (4, {}),
    "lora.alpha": (8.0, {}),
    "lora.dropout": (0.1, {}),
    "lora.layers": ("all", {}),
    "lora.until": (0.25, TOKENS),
    "text_lora.rank": (8, TEXT_LORA),
    "text_lora.alpha": (2.0, TEXT_LORA),
    "text_lora.until": (0.5, TEXT_LORA),
    "text_lora.lr": (0.5, TEXT_LORA),
    "train.steps": (9, {}),
    "train.epochs": (2, {"train": {"steps": None, "epochs": 1}}),
    "train.batch_size": (2, {}),
    "train.accumulate": (2, {}),
    "train.lr": (0.5, {}),
    "train.scale_lr": (True, {}),
    "train.guidance": (1.0, {}),
    "train.max_grad_norm": (2.0, {}),
    "train.weighting.scheme": ("cosmap", {}),
    "train.weighting.mean": (0.5, {"train": {"weighting": {"scheme": "logit_normal"}}}),
    "train.weighting.std": (2.0, {"train": {"weighting": {"scheme": "logit_normal"}}}),
    "train.weighting.scale": (2.0, {"train": {"weighting": {"scheme": "mode"}}}),
    "optimizer.name": ("adamw8bit", {}),
    "optimizer.beta1": (0.5, {}),
    "optimizer.beta2": (0.5, {}),
    "optimizer.eps": (0.5, {}),
    "optimizer.weight_decay": (0.5, {}),
    "optimizer.beta3": (0.5, PRODIGY),
    "optimizer.decouple": (False, PRODIGY),
    "optimizer.bias_correction": (False, PRODIGY),
    "optimizer.safeguard_warmup": (False, PRODIGY),
    "optimizer.d_coef": (2.0, PRODIGY),
    "optimizer.d0": (0.5, PRODIGY),
    "optimizer.growth_rate": (1.5, PRODIGY),
    "schedule.name": ("linear", {}),
    "schedule.warmup": (2, {"schedule": {"name": "linear"}}),
    "schedule.cycles": (2, {"schedule": {"name": "cosine_with_restarts"}}),
    "schedule.power": (2.0, {"schedule": {"name": "polynomial"}}),
    "checkpoint.every": (3, {}),
    "checkpoint.minutes": (5.0, {}),
    "checkpoint.keep": (5, {}),
    "validate.prompts": (["a hill"], {}),
    "validate.every": (4, {}),
    "validate.loss": (False, {}),
    "validate.count": (2, {}),
    "validate.steps": (4, {}),
    "validate.size": (64, {}),
    "stop.no_better_for": (4, {"validate": {"every": 4}}),
    "stop.loss_above": (4.0, {"validate": {"every": 4}}),
    "stop.at": (0.1, {"validate": {"every": 4}}),
    "track.to": ([], {}),
    "export.dtype": ("fp32", {}),
    "export.best": (True, {"validate": {"every": 4}}),
    "hub.push": (True, {"hub": {"repo": "me/it"}}),
    "hub.repo": ("me/it", {}),
    "hub.private": (True, {}),
    "notify.url": ("http://localhost:1", {}),
    "notify.command": ("true", {}),
    "compute.gpus": (2, {}),
}


def laid_over(tables: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Table by table; None takes a key out."""
    out = copy.deepcopy(tables)
    for key, value in more.items():
        out[key] = laid_over(out.get(key, {}), value) if isinstance(value, dict) else copy.deepcopy(value)
    return {key: value for key, value in out.items() if value is not None}
