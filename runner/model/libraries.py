"""The model libraries (diffusers, transformers, peft): importing them once, and keeping them quiet."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def quiet() -> None:
    """No progress bars and no warnings of theirs: bars would tear ours apart, and bitsandbytes warns of kernels that
    are not used."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def preload_libraries() -> None:
    """Import what a run will import, and freeze the imported objects (gc.freeze): half a million, which every
    collection between phases would walk through. Call it before any model is loaded, or the model is frozen too and
    never freed.
    """
    # The libraries would import bitsandbytes wherever it is installed, and torch's compiler with it, for layers not
    # used here.
    with _hide_module("bitsandbytes"):
        import diffusers
        import peft
        import transformers
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        for is_available in (is_bnb_available, is_bnb_4bit_available):  # cached: else the first adapter would import it
            is_available()
        for name in ("FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL"):
            getattr(diffusers, name)
        for name in ("CLIPTextModel", "T5EncoderModel", "AutoTokenizer"):
            getattr(transformers, name)
        assert peft.LoraConfig
    gc.collect()
    gc.freeze()
    gc.enable()


@contextmanager
def _hide_module(name: str) -> Iterator[None]:
    """Within, the module cannot be imported. Nothing is hidden once it, or a library that looks for it, has been
    imported."""
    if {name, "diffusers", "transformers", "peft"} & sys.modules.keys():
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # for `import` it is absent
    try:
        yield
    finally:
        del sys.modules[name]
