"""What the keys for small cards do to a model: bytes of its transformer, seconds to load it the first time and from the
cache, the most memory that took, seconds per step, and what the graph of a step holds.

    python tools/bench/make_model.py MODEL
    python tools/bench/small_cards.py MODEL [--steps 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runner.base.layers import linear_layers, lora_layers
from runner.model import device, flow_matching, libraries, lora, quantization
from runner.model.base import Base
from runner.model.family import PromptEmbeds
from runner.model.flux1 import loading
from runner.model.flux1.latents import pack as flux_pack
from runner.model.flux1.transformer import checkpointed_blocks, enable_gradient_checkpointing, predictor

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

CPU = torch.device("cpu")
SIDE, WORDS = 32, 64  # latent side (a picture of 256 pixels) and tokens of text


def load(base: Base) -> tuple[float, int]:
    """(seconds, most bytes while the transformer was loaded beyond those before) of this process' first."""
    libraries.preload_libraries()
    device.reset_peak(base.device)
    before, started = device.peak_memory(base.device), time.perf_counter()
    loading.load_transformer(base)
    return time.perf_counter() - started, device.peak_memory(base.device) - before


def in_a_process(model: Path, scheme: str, cache: str) -> tuple[float, float]:
    command = [sys.executable, __file__, str(model), "--load", scheme, "--cache", cache]
    seconds, most = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(seconds), int(most) / 2**20


def step(transformer: FluxTransformer2DModel, base: Base, count: int) -> tuple[float, int, float]:
    """(seconds, bytes that the graph holds beside the weights as they are kept, loss)."""
    config = transformer.config
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, SIDE, SIDE, generator=generator)
    noised = flow_matching.add_noise(latents, torch.tensor([0.5]), torch.tensor([0.5]), generator, flux_pack)
    text = PromptEmbeds(
        torch.randn(1, WORDS, config.joint_attention_dim, generator=generator).to(base.dtype),
        torch.randn(1, config.pooled_projection_dim, generator=generator).to(base.dtype),
    )
    predict = predictor(transformer, 3.5, base.device, base.dtype)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*transformer.parameters(), *transformer.buffers())}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    times, loss = [], torch.zeros(())
    for _ in range(count):
        held.clear()
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), device.autocast(CPU, base.dtype):
            loss = (predict(noised, text, SIDE, SIDE).float() - noised.target).square().mean()
        loss.backward()
        times.append(time.perf_counter() - started)
    return statistics.median(times), sum(size for at, size in held.items() if at not in own), float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--load", help=argparse.SUPPRESS)  # only load this scheme, once
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    libraries.quiet()
    if asked.load:
        print(*load(Base(asked.model, None, CPU, torch.float32, asked.load, asked.cache)))
        return
    print("scheme  keys        weights   load, peak       again, peak      step    graph    loss")
    with tempfile.TemporaryDirectory() as name:
        for scheme in ("none", *quantization.CODES, "nf4"):
            (first, most), (again, most_again) = (in_a_process(asked.model, scheme, name) for _ in range(2))
            base = Base(asked.model, None, CPU, torch.float32, scheme, Path(name))
            made: FluxTransformer2DModel = loading.load_transformer(base)
            size = sum(tensor.numel() * tensor.element_size() for tensor in (*made.parameters(), *made.buffers()))
            for keys in ("", "recompute 1", "recompute 2"):
                config = dict(made.config)
                layers = tuple(lora_layers(linear_layers(config), "attention"))
                if not keys:
                    lora.attach_lora(made, lora.LoraShape(16, 16.0, 0.0, layers), 0)
                else:
                    enable_gradient_checkpointing(made, checkpointed_blocks(made, int(keys.split()[1])))
                seconds, held, loss = step(made.train(), base, asked.steps)
                print(
                    f"{scheme:7} {keys:11} {size / 2**20:4.0f} MiB {first:5.2f} s {most:4.0f} MiB {again:5.2f} s "
                    f"{most_again:4.0f} MiB {seconds:6.3f} s {held / 2**20:4.0f} MiB {loss:.5f}"
                )


if __name__ == "__main__":
    main()
