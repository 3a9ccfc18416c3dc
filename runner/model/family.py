"""What a model family is: a small protocol that training and export talk to, whatever model they train.

FLUX.1 (`runner.model.flux1`) is the first family; `runner.model.families` finds the one of a base. What a plan must
know of a family without torch stands in `runner.base.architectures`.

Shapes: B batch, T text tokens, H x W picture in pixels, C latent channels, h x w latent height and width, N image
tokens of D numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from runner.base.architectures import Architecture
from runner.model.base import Base
from runner.model.flow_matching import NoisyBatch
from runner.model.latents import LatentScale


@dataclass(frozen=True)
class PromptEmbeds:
    """Prompts as the transformer reads them: txt [B, T, width] by token, vec [B, width] of the whole prompt."""

    txt: Tensor
    vec: Tensor

    def cpu(self) -> PromptEmbeds:
        return PromptEmbeds(self.txt.cpu(), self.vec.cpu())


# The transformer's prediction, [B, N, D]: (noisy images, prompts, latent height, latent width).
Predict = Callable[[NoisyBatch, PromptEmbeds, int, int], Tensor]


@dataclass(frozen=True)
class TrainSettings:
    """How a transformer is set up for training, as the spec's `model` table says.

    attention: diffusers' name of a backend. recompute: every so many blocks are run again in the backward pass (0:
    none), or "selective": parts of all of them. offloaded: the blocks wait in host memory and recompute by themselves.
    compiled: the blocks will be compiled, so they stay as they are.
    """

    attention: str
    recompute: int | Literal["selective"]
    offloaded: bool
    compiled: bool


@dataclass(frozen=True)
class LayerNames:
    """How other programs name a family and its layers.

    title: the model's name in messages. version, network: sd-scripts' `ss_base_model_version` and `ss_network_module`.
    architecture: ModelSpec's name of it, given whether the base takes a guidance. implementation: ModelSpec's.
    matrix_of: a module of the transformer -> the matrix of the original model that holds it, and all modules in that
    matrix in the order of its output rows; None for an unknown module. modules_of: a matrix -> its modules; None for an
    unknown one. around: the modules that are in no block.
    """

    title: str
    version: str
    network: str
    architecture: Callable[[bool], str]
    implementation: str
    matrix_of: Callable[[str], tuple[str, tuple[str, ...]] | None]
    modules_of: Callable[[str], tuple[str, ...] | None]
    around: frozenset[str]


class TextPipeline(Protocol):
    """The text encoders as the stock library loads them, which is what users of the exports do."""

    @property
    def encoders(self) -> Mapping[str, tuple[Any, Any]]:
        """(model, tokenizer) of each encoder that is loaded, by the family's name of it."""

    def load_embeddings(self, file: Path, token_strings: Sequence[str]) -> None:
        """Load exported token rows, in the order of their token strings."""

    def load_lora(self, file: Path) -> None:
        """Load the text encoder's part of an exported LoRA, if it has one."""

    def read(
        self,
        prompts: Sequence[str],
        length: int,
        *,
        scale: float = 1.0,
        cached: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> list[PromptEmbeds]:
        """Each prompt's embeddings, [1, T, width] and [1, width], on the CPU.

        length: tokens that an encoder without a length of its own reads; scale: strength of the text encoder's LoRA;
        cached: of encoders that are not loaded, what they make of each prompt.
        """


class ImagePipeline(Protocol):
    """Transformer, VAE and scheduler as the stock library puts them together."""

    @property
    def transformer(self) -> Any: ...

    def load_lora(self, file: Path) -> None:
        """Load the transformer's part of an exported LoRA, if it has one."""

    def draw(
        self, prompt: PromptEmbeds, seeds: Sequence[int], *, steps: int, size: int, guidance: float, scale: float = 1.0
    ) -> list[Image.Image]:
        """One picture of size x size pixels per seed. The noise comes from the CPU, so a seed means the same on every
        device. scale: strength of the LoRA."""


class ModelFamily(Protocol):
    """Everything that is particular to one kind of model. Encoders go by their names in `architecture.encoders`.

    The transformer is one of diffusers' models: it has `device`, `add_adapter`, `unload_lora` and, for `model.compile`,
    `compile_repeated_blocks`. A text encoder that learns token rows is one of transformers': it has
    `get_input_embeddings` and `set_input_embeddings`. A base's noise schedule is in its folder `scheduler`, as
    diffusers' FlowMatchEulerDiscreteScheduler reads it.
    """

    @property
    def architecture(self) -> Architecture: ...

    @property
    def layer_names(self) -> LayerNames: ...

    # ---- loading: each part frozen, in eval mode, on the base's device; raises FluxrunError where its files are not usable

    def load_transformer(self, base: Base) -> nn.Module: ...

    def load_vae(self, base: Base) -> nn.Module: ...

    def load_encoder(self, base: Base, encoder: str) -> nn.Module: ...

    def load_tokenizer(self, base: Base, encoder: str) -> Any: ...

    # ---- text

    def token_ids(self, encoder: str, tokenizer: Any, caption: str, length: int) -> Tensor:
        """[T] ids of a caption; longer ones are cut off. length: `model.max_sequence_length`, for encoders without
        their own."""

    def embed(self, encoder: str, model: nn.Module, tokenizer: Any, ids: Tensor, pooling: str) -> Tensor:
        """ids [B, T] -> what the encoder gives, [B, T, width] or a pooled [B, width]. pooling: "diffusers" or "eos",
        where a pooled encoder reads its vector. Differentiable where the model has something to learn."""

    def prompt_embeds(self, embeddings: Mapping[str, Tensor]) -> PromptEmbeds:
        """What the encoders gave, by name, as the transformer reads it."""

    def recompute_encoder(self, encoder: str, model: nn.Module, *, save_activations: bool, projections: bool) -> None:
        """Let an encoder that learns keep fewer activations for the backward pass, if the family has a way.

        save_activations: keep them all, since the caller checkpoints the encoder; projections: recompute also the
        products.
        """

    # ---- latents

    def encode_image(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """Moments of the latents: pixels [3, H, W] uint8 -> [2*C, h, w] (mean, log-variance), on the CPU."""

    def latent_scale(self, base: Base) -> LatentScale: ...

    def pack(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> image tokens [B, N, D], in which the transformer predicts and the loss is taken."""

    # ---- training

    def prepare_training(self, transformer: nn.Module, settings: TrainSettings) -> None:
        """Set up a loaded transformer, before its adapter is attached. Raises FluxrunError where this machine
        cannot."""

    def end_training(self, transformer: nn.Module) -> None:
        """Undo `prepare_training`, and drop what was kept per shape: the transformer is as it was loaded."""

    def predictor(self, transformer: nn.Module, guidance: float, device: torch.device, dtype: torch.dtype) -> Predict:
        """The function that predicts the velocity of noisy images. Bases without a guidance embedding ignore
        `guidance`."""

    # ---- drawing, through the stock library

    def text_pipeline(self, base: Base, *, with_large: bool = True) -> TextPipeline:
        """with_large: whether the large encoders are loaded; without them `read` is given what they make of prompts."""

    def image_pipeline(self, base: Base, transformer: Any, *, with_vae: bool = True) -> ImagePipeline:
        """With this transformer, and the base's VAE unless nothing will be drawn."""
