"""LoRA adapters on a frozen transformer, through peft; their tensors under diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.seeds import derive

ADAPTER = "default"


@dataclass(frozen=True)
class LoraShape:
    """layers: full module names. Effect of one layer: (alpha / rank) * B @ A, A [rank, in], B [out, rank]."""

    rank: int
    alpha: float
    dropout: float
    layers: tuple[str, ...]


def attach_lora(model: Any, shape: LoraShape, seed: int) -> dict[str, nn.Parameter]:
    """Add trainable fp32 adapters; returns them by name, e.g. "transformer_blocks.0.attn.to_q.lora_A.weight".

    A is normal with standard deviation 1/rank (peft's "gaussian", which the reference script uses), drawn per layer
    from the seed and the layer's name; B is zero, so training starts at the base. Raises ValueError where peft adapted
    other layers.
    """
    from peft import LoraConfig

    from runner.model.fused_lora import fuse_linears

    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # peft annotates int and takes any number
        lora_dropout=shape.dropout,
        init_lora_weights="gaussian",
        target_modules=list(shape.layers),
    )
    model.add_adapter(config, adapter_name=ADAPTER)
    parameters = adapter_parameters(model)
    if len(parameters) != 2 * len(shape.layers):
        raise ValueError(f"peft adapted {len(parameters) // 2} layers instead of the planned {len(shape.layers)}")
    skip_dtype_casts(model, shape.dropout)
    fuse_linears(model)
    device = model.device  # read once: diffusers searches all modules for it
    for name, parameter in parameters.items():
        parameter.data = parameter.data.to(device, torch.float32)  # the layer itself may wait in host memory
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(derive(seed, "lora", name))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / shape.rank)
    return parameters


def skip_dtype_casts(model: nn.Module, dropout: float) -> None:
    """Let adapters take their input as it is: autocast would undo peft's cast to fp32 at once. With dropout the cast
    stays, so dropout is drawn in fp32."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = dropout > 0


def detach_lora(model: Any) -> None:
    """Remove every adapter; the layers below them are the same objects as before."""
    model.unload_lora()
    for name in ("peft_config", "_hf_peft_config_loaded"):  # without an adapter the class's attributes show
        vars(model).pop(name, None)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by the names that diffusers' `save_lora_weights` gives them, without the component's
    prefix."""
    return {
        name.replace(f".{ADAPTER}.weight", ".weight"): parameter
        for name, parameter in model.named_parameters()
        if f".{ADAPTER}." in name
    }


def set_tensors(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's values into an adapter. Raises ValueError where the names differ."""
    if parameters.keys() != tensors.keys():
        examples = sorted(parameters.keys() ^ tensors.keys())[:3]
        raise ValueError(f"adapter and checkpoint name different layers, e.g. {', '.join(examples)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def adapter_metadata(shape: LoraShape) -> dict[str, Any]:
    """peft's config of the adapter, from which diffusers reads alpha and rank. Equal shapes give equal metadata."""
    from peft import LoraConfig

    config = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, lora_dropout=shape.dropout).to_dict()
    config["target_modules"] = sorted(shape.layers)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
