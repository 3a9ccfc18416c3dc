"""FLUX.1 as diffusers stores it: its parts, its latent layout, its flow-matching objective.

The only file that knows the model library. Shapes: B batch, C = 16 latent channels, h x w latent height and width
(an eighth of the picture's), T text tokens; packed image tokens are 2 x 2 latent patches: [B, h*w/4, 4*C].
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from runner.base.files import PARTS, fingerprint, local_folder
from runner.core import hub
from runner.core.errors import FluxrunError, UnreachableError, is_disk_error
from runner.core.hashing import content_key
from runner.model import quantization
from runner.model.base import Base
from runner.model.flux1.transformer import Rotary, blocks_of
from runner.model.offload import offload_blocks


def open_base(
    text: str, revision: str | None, variant: str | None, device: torch.device, dtype: torch.dtype,
    quantize: str = "none", cache: Path | None = None, offload: bool = False,
) -> Base:  # fmt: skip
    """Find the base on disk (`builtin:tiny`, a folder), or fetch its diffusers parts from the hub. Raises UnreachableError where
    the hub does not answer, FluxrunError where it does not give them."""
    folder = local_folder(text)
    if folder is None:
        folder = _fetched(text, revision)
    return Base(folder, variant, device, dtype, quantize, cache, offload)


def _fetched(text: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", *(f"{part}/*" for part in PARTS)]  # not the single-file copies beside them
    try:
        hub.set_up_client(hub.ANSWER_TIMEOUT)
        return Path(snapshot_download(text, revision=revision, allow_patterns=wanted))
    except Exception as error:
        # The client has an exception for each way of not being answered, and passes on those of the libraries below it.
        if is_disk_error(error):
            raise
        if hub.is_transient(error):
            raise UnreachableError(
                f"{text} cannot be fetched: the hub does not answer ({hub.describe_error(error)})"
            ) from error
        raise FluxrunError(
            f"{text} cannot be fetched ({hub.describe_error(error)}); `fluxrun check` says more"
        ) from error


def quiet() -> None:
    """The libraries' progress bars would tear ours; bitsandbytes, where it is installed, warns of kernels nobody asked for."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_clip(base: Base) -> nn.Module:
    from transformers import CLIPTextModel

    return _load(CLIPTextModel, base, "text_encoder")


def load_t5(base: Base) -> nn.Module:
    from transformers import T5EncoderModel

    made: Any = _load_large(T5EncoderModel, empty_t5, base, "text_encoder_2")
    return offload_blocks(made, list(made.encoder.block), base.device) if base.offload else made  # type: ignore[no-any-return]


def empty_t5(folder: Path) -> Any:
    from transformers import T5EncoderModel

    return T5EncoderModel(T5EncoderModel.config_class.from_dict(json.loads((folder / "config.json").read_text())))


def empty_transformer(folder: Path) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))


def load_encoder(base: Base, encoder: str) -> nn.Module:
    """ "clip" or "t5"."""
    return load_clip(base) if encoder == "clip" else load_t5(base)


def load_vae(base: Base) -> nn.Module:
    """In channels-last, in which convolutions take half the time."""
    from diffusers import AutoencoderKL

    vae: Any = _load(AutoencoderKL, base, "vae").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if base.device.type == "cpu":  # the others are the file's own pages, which would keep all of it in memory
        for parameter in vae.parameters():
            if parameter.dim() != 4:
                parameter.data = parameter.data.clone()
    return vae  # type: ignore[no-any-return]


def load_transformer(base: Base) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    made: Any = _load_large(FluxTransformer2DModel, empty_transformer, base, "transformer")
    made.pos_embed = Rotary(made.pos_embed)
    return offload_blocks(made, blocks_of(made), base.device) if base.offload else made  # type: ignore[no-any-return]


def load_tokenizer(base: Base, encoder: str) -> Any:
    """The tokenizer of "clip" or "t5"."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.folder, subfolder={"clip": "tokenizer", "t5": "tokenizer_2"}[encoder])


def _weights_folder(base: Base, part: str) -> Path:
    """Raises FluxrunError where the weights are no safetensors: the libraries would take a pickle too, which can run any code."""
    folder = base.folder / part
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise FluxrunError(
            f"model.base: {folder} has no .safetensors file; other weights (.bin, .ckpt) can run code when they are read, "
            "so fluxrun does not: save the model again with safe_serialization=True"
        )
    return folder


def _load(kind: Any, base: Base, part: str) -> nn.Module:
    """One frozen part, whole."""
    _weights_folder(base, part)
    loaded = kind.from_pretrained(
        base.folder, subfolder=part, dtype=base.dtype, variant=base.variant, use_safetensors=True
    )
    frozen: nn.Module = loaded.to(base.device).requires_grad_(False).eval()
    return frozen


def _load_large(kind: Any, empty: Callable[[Path], Any], base: Base, part: str) -> nn.Module:
    """One of the two large parts, quantised where the base says so; in host memory where its blocks will wait there. On a
    CPU its tensors are the file's own pages, where they need not be changed. `empty`: the model without weights."""
    if base.offload:
        base = replace(base, device=torch.device("cpu"))
    if base.quantize == "none" and base.device.type == "cpu":
        return _load(kind, base, part)
    return filled(empty, base, part)


def filled(empty: Callable[[Path], Any], base: Base, part: str) -> nn.Module:
    """The same tensor by tensor straight to the device, so that host memory never holds more than one."""
    folder = _weights_folder(base, part)
    with torch.device("meta"):
        model = empty(folder)
    kept = None
    if base.quantize != "none" and base.cache:
        key = content_key(
            "quantized", quantization.FORMAT, fingerprint(folder), base.variant, base.quantize, str(base.dtype)
        )
        kept = base.cache / "quantized" / key[:2] / f"{key}.safetensors"
    return quantization.load_quantized(
        model, weight_files(folder, base.variant), base.quantize, base.dtype, base.device, kept
    )


def weight_files(folder: Path, variant: str | None) -> dict[str, Path]:
    """The file of each tensor of a part, as the libraries choose it: the one file, or an index beside several."""
    mark = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        whole, index = folder / f"{stem}{mark}.safetensors", folder / f"{stem}.safetensors.index{mark}.json"
        if whole.is_file():
            with safe_open(whole, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), whole)
        if index.is_file():
            found: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return {name: folder / Path(file).name for name, file in found.items()}
    there = ", ".join(sorted(path.name for path in folder.glob("*.safetensors*"))) or "none"
    raise FluxrunError(f"model.variant: {folder} has no such weights (found {variant!r}); its files are: {there}")
