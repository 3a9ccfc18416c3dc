"""The model libraries (diffusers, transformers, peft): importing them once, and keeping them quiet."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def quiet() -> None:
    """No progress bars and no warnings of theirs: bars would tear ours apart, and bitsandbytes warns of kernels that are
    not used."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def preload_libraries() -> None:
    """Import what a run will import and take it out of the garbage collector's way: half a million objects, which every
    collection between phases would walk through. To be called before any model is loaded, else that stays for ever too.
    """
    # which they would import wherever it is installed, and torch's compiler with it, for layers that nobody asks for
    with _hide_module("bitsandbytes"):
        import diffusers
        import peft
        import transformers
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        for ask in (
            is_bnb_available,
            is_bnb_4bit_available,
        ):  # which are remembered; else the first adapter would import it
            ask()
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
    """A module that cannot be imported within; it can be again afterwards. Not where it was already, or where a library has
    seen that it is there."""
    if {name, "diffusers", "transformers", "peft"} & sys.modules.keys():
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # what `import` takes for absent
    try:
        yield
    finally:
        del sys.modules[name]
