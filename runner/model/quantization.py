"""Frozen linear layers held in 8 or 4 bits, made whole again one at a time for each use; and models loaded that way.

A layer of its own, not torchao's tensors: those leave the weight that was made whole in the graph until the backward pass,
in every layer, so that training takes more memory than without (torchao 0.18: ten layers of 2 MiB hold 20 MiB).
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

from runner.base.quantized_size import NF4_BLOCK, in_a_block
from runner.core import files
from runner.core.errors import BadFileError, FluxrunError
from runner.model import tensors

FORMAT = 1  # of the kept files: raise it when what is quantised, or how, changes
LARGEST = {"int8": 127.0, "fp8": 448.0}  # e4m3's
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def quantize(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> (codes, scale). int8, fp8: a scale per row, [out, 1]. nf4 (bitsandbytes' own): two codes a byte,
    the largest of every 64 numbers in fp32.

    A scale is as exact as the weight's dtype can hold, and the codes are taken against it, so nothing is lost when both are
    multiplied in that dtype. Zero rows have scale 1.
    """
    if scheme == "nf4":
        codes, state = _bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        return codes, state.absmax
    whole = weight.float()
    kept = torch.float32 if weight.dtype == torch.float16 else weight.dtype  # a fp16 scale would underflow
    scale = (whole.abs().amax(dim=1, keepdim=True) / LARGEST[scheme]).to(kept)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (whole / scale.float()).clamp(-LARGEST[scheme], LARGEST[scheme])
    return (codes.round() if scheme == "int8" else codes).to(CODES[scheme]), scale


def dequantize(codes: Tensor, scale: Tensor, scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight that codes stand for, [out, in] in `dtype`."""
    if scheme == "nf4":
        # One row: 0.50's CPU kernel wants whole blocks in each, and gives two dimensions where one is asked for.
        functional, flat = _bitsandbytes(), torch.Size([1, shape[0] * shape[1]])
        state = functional.QuantState(scale, flat, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
        made: Tensor = functional.dequantize_4bit(codes, state)
        return made.view(shape)
    return (codes.to(scale.dtype) * scale).to(dtype)


def _layout(scheme: str, out: int, inside: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `quantize` makes of a weight, without its numbers."""
    if scheme == "nf4":
        count = out * inside
        shapes = {"codes": ((count + 1) // 2, 1), "scale": (-(-count // NF4_BLOCK),)}
        dtypes = {"codes": torch.uint8, "scale": torch.float32}
    else:
        shapes = {"codes": (out, inside), "scale": (out, 1)}
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


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, whose graph holds the codes: the weight is made again in the backward pass. Neither learns."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, scheme: str, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.about = scheme, shape
        return linear(x, dequantize(codes, scale, scheme, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codes, scale = ctx.saved_tensors
        scheme, shape = ctx.about
        return grad @ dequantize(codes, scale, scheme, shape, grad.dtype), None, None, None, None, None


class QuantLinear(nn.Linear):
    """Empty when made, on the meta device; `dtype` is the one the weight would have. peft takes it for the linear layer that
    it is."""

    codes: Tensor
    scale: Tensor

    def __init__(self, plain: nn.Linear, scheme: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
        self.scheme, self.dtype = scheme, dtype
        for name, empty in _layout(scheme, self.out_features, self.in_features, dtype).items():
            self.register_buffer(name, empty)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Of the weight's shape, dtype and device, which peft and T5 ask for; NaN, for whoever would compute with it."""
        nothing = torch.full((1, 1), torch.nan, dtype=self.dtype, device=self.codes.device)
        return nothing.expand(self.out_features, self.in_features)

    def whole(self) -> Tensor:
        return dequantize(self.codes, self.scale, self.scheme, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        shape = self.out_features, self.in_features
        made: Tensor = _Product.apply(x.to(dtype), self.codes, self.scale, bias, self.scheme, shape)  # type: ignore[no-untyped-call]
        return made


# ---- whole models --------------------------------------------------------------------------------------------------


def load_quantized(
    model: nn.Module, weights: Mapping[str, Path], scheme: str, dtype: torch.dtype, device: torch.device, kept: Path | None
) -> nn.Module:  # fmt: skip
    """Give a model on the meta device its weights, the linear layers of its blocks quantised if `scheme` is not "none", one
    tensor at a time: at no moment is more of the plain model in host memory than one tensor. `weights`: the file of each
    name. `kept`: where the quantised model lies, or is put, so that the next time it is only read.

    Raises BadFileError for a name that no file has.
    """
    whole = getattr(model, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()  # T5 overflows there
    names = list(model.state_dict())
    for name, module in list(model.named_modules()):
        own = torch.float32 if name.rpartition(".")[2] in whole else dtype
        if scheme != "none" and type(module) is nn.Linear and in_a_block(name):
            module = QuantLinear(module, scheme, own)
            model.set_submodule(name, module)
        _allocate(module, own, device)
    if tie := getattr(model, "tie_weights", None):  # transformers': T5 has its table by two names
        tie()
    if kept is None or not _read_kept(model, kept):
        given = [_copy_tensor(model, name, weights[name], device) for name in names if name in weights]
        there = {id(tensor) for pair in given for tensor in pair}
        if lacking := [name for name, tensor in _named(model) if id(tensor) not in there]:
            raise BadFileError(
                f"model.base: no file has {lacking[0]} ({len(lacking)} tensors are not there); fetch it again"
            )
        if kept is not None:
            files.make_folder(kept.parent)
            tensors.save(kept, dict(_named(model)), {"kind": "quantized", "key": kept.stem})
    return model.requires_grad_(False).eval()


def _allocate(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Memory for the module's own tensors, all of it before the first is read: between the plain weights that come and go, it
    would end in pieces."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        module.register_buffer(name, torch.empty_like(buffer, device=device))


def _copy_tensor(model: nn.Module, name: str, file: Path, device: torch.device) -> tuple[Tensor, ...]:
    """Copy one tensor of the plain model to its place; gives what it went into."""
    place, _, leaf = name.rpartition(".")
    owner, tensor = model.get_submodule(place), _read(file, name).to(device)
    if isinstance(owner, QuantLinear) and leaf == "weight":
        codes, scale = quantize(tensor.to(owner.dtype), owner.scheme)
        owner.codes.copy_(codes)
        owner.scale.copy_(scale)
        return owner.codes, owner.scale
    target: Tensor = getattr(owner, leaf)
    with torch.no_grad():
        target.copy_(tensor)
    return (target,)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _read(path: Path, name: str) -> Tensor:
    """One tensor of a file, which is opened anew each time: pages that were read would else count as this process' memory."""
    try:
        with safe_open(path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name).clone()
            return tensor
    except (SafetensorError, OSError) as error:
        raise BadFileError(f"{path}: {name} cannot be read ({error})") from error


def _read_kept(model: nn.Module, path: Path) -> bool:
    """Fill the model from its quantised file; False where there is none, or it is damaged (then it goes)."""
    if not path.is_file():
        return False
    places = dict(_named(model))
    try:
        with torch.no_grad():
            for name, tensor in tensors.verified(path):
                places.pop(name).copy_(tensor)
    except (BadFileError, KeyError):
        path.unlink(missing_ok=True)
        return False
    with contextlib.suppress(OSError):  # another user's: then it only looks older
        os.utime(path)  # when it was last asked for, for `fluxrun cache prune`
    return not places
