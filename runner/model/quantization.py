"""Frozen linear layers in 8 or 4 bits, dequantized one at a time for each use; and models loaded that way.

Not torchao's tensors: in every layer those leave the dequantized weight in the graph until the backward pass, so
training takes more memory than without them (torchao 0.18: ten layers of 2 MiB hold 20 MiB).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import linear

from runner.base.quantized_size import NF4_BLOCK, is_in_block
from runner.core import files
from runner.core.errors import BadFileError, FluxrunError
from runner.model import tensors

FORMAT = 1  # of the quantized files in the cache: raise it when what is quantized, or how, changes
LARGEST = {"int8": 127.0, "fp8": 448.0}  # e4m3's
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def quantize(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> (codes, scale). Raises FluxrunError where nf4 lacks bitsandbytes.

    int8, fp8: codes [out, in], a scale per row [out, 1]. nf4 (bitsandbytes' own format): two codes a byte, [out * in /
    2, 1], and as scale the largest magnitude of every 64 numbers, in fp32. The scale is rounded to the weight's dtype
    before the codes are taken against it, so multiplying both in that dtype loses nothing. Rows of zeros have scale 1.
    """
    if scheme == "nf4":
        codes, state = _bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        return codes, state.absmax
    exact = weight.float()
    scale_dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype  # an fp16 scale would underflow
    scale = (exact.abs().amax(dim=1, keepdim=True) / LARGEST[scheme]).to(scale_dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (exact / scale.float()).clamp(-LARGEST[scheme], LARGEST[scheme])
    return (codes.round() if scheme == "int8" else codes).to(CODES[scheme]), scale


def dequantize(codes: Tensor, scale: Tensor, scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight that the codes stand for, [out, in] in `dtype`. shape: (out, in)."""
    if scheme == "nf4":
        # As one row: bitsandbytes 0.50's CPU kernel needs whole blocks in every row, and returns two dimensions for
        # one.
        functional, flat = _bitsandbytes(), torch.Size([1, shape[0] * shape[1]])
        state = functional.QuantState(scale, flat, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
        weight: Tensor = functional.dequantize_4bit(codes, state)
        return weight.view(shape)
    return (codes.to(scale.dtype) * scale).to(dtype)


def _layout(scheme: str, out: int, in_features: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes and scale as `quantize` gives them for a weight, without values."""
    if scheme == "nf4":
        count = out * in_features
        shapes = {"codes": ((count + 1) // 2, 1), "scale": (-(-count // NF4_BLOCK),)}
        dtypes = {"codes": torch.uint8, "scale": torch.float32}
    else:
        shapes = {"codes": (out, in_features), "scale": (out, 1)}
        dtypes = {"codes": CODES[scheme], "scale": torch.float32 if dtype == torch.float16 else dtype}
    return {name: torch.empty(shapes[name], dtype=dtypes[name], device="meta") for name in shapes}


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise FluxrunError(
            f'model.quantize: nf4 needs bitsandbytes ({error}); pip install "fluxrun[bitsandbytes]"'
        ) from error
    return functional


class _QuantizedProduct(torch.autograd.Function):
    """x @ weight.T + bias with frozen weight and bias. The graph holds the codes; the backward pass dequantizes them
    again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, scheme: str, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.scheme, ctx.shape = scheme, shape
        return linear(x, dequantize(codes, scale, scheme, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        return grad @ dequantize(codes, scale, ctx.scheme, ctx.shape, grad.dtype), None, None, None, None, None


class QuantLinear(nn.Linear):
    """A frozen linear layer whose weight is codes and scale; peft adapts it as any linear layer.

    It is built on the meta device, without values. dtype: what the weight is dequantized to.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, scheme: str, dtype: torch.dtype) -> None:
        """linear: the layer it replaces."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scheme, self.dtype = scheme, dtype
        for name, empty in _layout(scheme, self.out_features, self.in_features, dtype).items():
            self.register_buffer(name, empty)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A placeholder with the weight's shape, dtype and device, which peft and T5 ask for; NaN, so accidental use
        shows."""
        placeholder = torch.full((1, 1), torch.nan, dtype=self.dtype, device=self.codes.device)
        return placeholder.expand(self.out_features, self.in_features)

    def dequantized(self) -> Tensor:
        """The weight, [out, in]."""
        return dequantize(self.codes, self.scale, self.scheme, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        shape = self.out_features, self.in_features
        out: Tensor = _QuantizedProduct.apply(x.to(dtype), self.codes, self.scale, bias, self.scheme, shape)  # type: ignore[no-untyped-call]
        return out


# ---- whole models --------------------------------------------------------------------------------------------------


def load_quantized(
    model: nn.Module, weights: Mapping[str, Path], scheme: str, dtype: torch.dtype, device: torch.device,
    quantized_file: Path | None,
) -> nn.Module:  # fmt: skip
    """Load a model that is on the meta device, one tensor at a time, so host memory never holds more than one.

    weights: the file of each tensor. scheme: "none", or how the linear layers of its blocks are quantized.
    quantized_file: the quantized model in the cache; it is written where it is missing, and read instead of `weights`
    where it is there. Raises BadFileError for a tensor that no file has.
    """
    fp32_modules = getattr(model, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()  # T5 overflows
    names = list(model.state_dict())
    for name, module in list(model.named_modules()):
        module_dtype = torch.float32 if name.rpartition(".")[2] in fp32_modules else dtype
        if scheme != "none" and type(module) is nn.Linear and is_in_block(name):
            quantized = QuantLinear(module, scheme, module_dtype)
            model.set_submodule(name, quantized)
            _allocate(quantized, module_dtype, device)
        else:
            _allocate(module, module_dtype, device)
    if tie := getattr(model, "tie_weights", None):  # transformers': T5's table has two names
        tie()
    if quantized_file is None or not _read_quantized(model, quantized_file):
        copied = [_copy_tensor(model, name, weights[name], device) for name in names if name in weights]
        filled = {id(tensor) for pair in copied for tensor in pair}
        if missing := [name for name, tensor in _named_tensors(model) if id(tensor) not in filled]:
            raise BadFileError(
                f"model.base: no file has {missing[0]} ({len(missing)} tensors are missing); fetch it again"
            )
        if quantized_file is not None:
            files.make_folder(quantized_file.parent)
            metadata = {"kind": "quantized", "key": quantized_file.stem}
            tensors.save(quantized_file, dict(_named_tensors(model)), metadata)
    return model.requires_grad_(False).eval()


def _allocate(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Memory for the module's own tensors. All of it is allocated before the first tensor is read; between the
    unquantized tensors that come and go it would be fragmented."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        module.register_buffer(name, torch.empty_like(buffer, device=device))


def _copy_tensor(model: nn.Module, name: str, file: Path, device: torch.device) -> tuple[Tensor, ...]:
    """Copy one tensor of the unquantized model into the loaded one; returns the tensors that it filled."""
    parent, _, leaf = name.rpartition(".")
    owner, tensor = model.get_submodule(parent), _read(file, name).to(device)
    if isinstance(owner, QuantLinear) and leaf == "weight":
        codes, scale = quantize(tensor.to(owner.dtype), owner.scheme)
        owner.codes.copy_(codes)
        owner.scale.copy_(scale)
        return owner.codes, owner.scale
    target: Tensor = getattr(owner, leaf)
    with torch.no_grad():
        target.copy_(tensor)
    return (target,)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _read(path: Path, name: str) -> Tensor:
    """One tensor of a file. The file is opened for each: while it is open, pages that were read count as this process'
    memory."""
    try:
        with safe_open(path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name).clone()
            return tensor
    except (SafetensorError, OSError) as error:
        raise BadFileError(f"{path}: {name} cannot be read ({error})") from error


def _read_quantized(model: nn.Module, path: Path) -> bool:
    """Fill the model from its quantized file; False where there is none, or it is damaged (then it is deleted)."""
    if not path.is_file():
        return False
    unfilled = dict(_named_tensors(model))
    try:
        with torch.no_grad():
            for name, tensor in tensors.verified(path):
                unfilled.pop(name).copy_(tensor)
    except (BadFileError, KeyError):
        path.unlink(missing_ok=True)
        return False
    with contextlib.suppress(OSError):  # another user's file keeps its time
        os.utime(path)  # `fluxrun cache prune` goes by the last use
    return not unfilled
