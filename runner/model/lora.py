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

    A is normal with standard deviation 1/rank (peft's "gaussian", the reference's choice), drawn per layer from the
    seed and the layer's name; B is zero, so that training starts at the base.
    """
    from peft import LoraConfig

    from runner.model.fused_lora import fuse_linears

    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # type: ignore[arg-type]  # peft annotates int and takes any number
        lora_dropout=shape.dropout,
        init_lora_weights="gaussian",
        target_modules=list(shape.layers),
    )
    model.add_adapter(config, adapter_name=ADAPTER)
    parameters = adapter_parameters(model)
    if len(parameters) != 2 * len(shape.layers):
        raise ValueError(f"peft adapted {len(parameters) // 2} layers, planned were {len(shape.layers)}")
    skip_dtype_casts(model, shape.dropout)
    fuse_linears(model)
    where = model.device  # diffusers looks through all modules for it
    for name, parameter in parameters.items():
        parameter.data = parameter.data.to(where, torch.float32)  # its layer may wait elsewhere
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(derive(seed, "lora", name))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / shape.rank)
    return parameters


def skip_dtype_casts(model: nn.Module, dropout: float) -> None:
    """Let adapters take their input as it comes: under autocast peft's cast to fp32 would be cast back at once. Dropout is
    drawn in fp32 all the same."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = dropout > 0


def detach_lora(model: Any) -> None:
    """Take every adapter out again; the layers below them are the very ones that were there before."""
    model.unload_lora()
    for name in ("peft_config", "_hf_peft_config_loaded"):  # class attributes where no adapter ever was
        vars(model).pop(name, None)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the names that `save_lora_weights` gives them, without the component's prefix."""
    return {
        name.replace(f".{ADAPTER}.weight", ".weight"): parameter
        for name, parameter in model.named_parameters()
        if f".{ADAPTER}." in name
    }


def set_tensors(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy values in; the names must be the same ones."""
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())[:3]
        raise ValueError(f"adapter and checkpoint name different layers, e.g. {', '.join(odd)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def adapter_metadata(shape: LoraShape) -> dict[str, Any]:
    """peft's own description of the adapter, which diffusers reads back (alpha and rank among it); repeatable."""
    from peft import LoraConfig

    config = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, lora_dropout=shape.dropout).to_dict()  # type: ignore[arg-type]
    config["target_modules"] = sorted(shape.layers)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
