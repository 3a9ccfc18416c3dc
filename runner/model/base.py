"""An opened base model: where its parts lie, and on which device and in which form they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from runner.base.files import PARTS, local_folder
from runner.core import hub
from runner.core.errors import FluxrunError, UnreachableError, is_disk_error


@dataclass(frozen=True)
class Base:
    """A base model on this disk.

    dtype: of the frozen parts; device: where they are loaded to. quantize: "none", or the scheme that the transformer
    and the large text encoders are held in; cache: the folder where quantized parts are kept, if anywhere. offload:
    whether their blocks wait in host memory.
    """

    folder: Path
    variant: str | None
    device: torch.device
    dtype: torch.dtype
    quantize: str = "none"
    cache: Path | None = None
    offload: bool = False


def open_base(
    text: str, revision: str | None, variant: str | None, device: torch.device, dtype: torch.dtype,
    quantize: str = "none", cache: Path | None = None, offload: bool = False,
) -> Base:  # fmt: skip
    """Find the base on disk (`builtin:tiny`, a folder), or fetch its parts in diffusers' layout from the hub.

    Raises UnreachableError where the hub does not answer, FluxrunError where it refuses.
    """
    folder = local_folder(text) or _download(text, revision)
    return Base(folder, variant, device, dtype, quantize, cache, offload)


def _download(text: str, revision: str | None) -> Path:
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
