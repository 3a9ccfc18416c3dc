"""A model family of two linear layers: everything that `runner.model.family.ModelFamily` asks for, and nothing more.

Shapes: B batch, h x w latent height and width (an eighth of the picture's), N = h*w image tokens of 3 numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from runner.base import architectures
from runner.base.architectures import Architecture, TextEncoder
from runner.core import safetensors
from runner.model import families
from runner.model.base import Base
from runner.model.family import LayerNames, Predict, PromptEmbeds, TrainSettings
from runner.model.flow_matching import NoisyBatch
from runner.model.latents import LatentScale
from runner.model.loading import load_part

WORDS, LENGTH, WIDTH, HIDDEN = (
    64,
    8,
    5,
    16,
)  # vocabulary, tokens of a caption, width of an embedding, width between the layers
SHIFT, SCALING = 0.1, 0.5
MATRICES = {"layer_in": "first", "layer_out": "second"}


def linear_layers(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"first": (config["hidden"], 3 + config["width"] + 1), "second": (3, config["hidden"])}


TOY = Architecture(
    name="toy",
    transformer="ToyTransformer",
    encoders={"words": TextEncoder("words", ("words",), length=LENGTH)},
    needed={"transformer": ("width", "hidden")},
    linear_layers=linear_layers,
    presets={"attention": ("first",), "attention+mlp": ("first", "second"), "all": ("first", "second")},
)


class ToyTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Of each image token: second(first([token, caption, timestep]))."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(3 + width + 1, hidden)
        self.second = nn.Linear(hidden, 3)

    def forward(self, img: Tensor, vec: Tensor, timesteps: Tensor) -> Tensor:
        """img [B, N, 3], vec [B, width], timesteps [B] -> [B, N, 3]."""
        whole = torch.cat([vec, timesteps[:, None]], 1)[:, None].expand(-1, img.shape[1], -1)
        out: Tensor = self.second(self.first(torch.cat([img, whole], 2)))
        return out


class ToyEncoder(nn.Module):
    """The mean of a caption's word vectors."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.table: nn.Embedding = nn.Embedding.from_pretrained(weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, ids: Tensor) -> Tensor:
        """[B, LENGTH] -> [B, WIDTH]."""
        out: Tensor = self.table(ids).mean(1)
        return out


class ToyVae(nn.Module):
    """The mean of 8 x 8 pixels; a latent has next to no variance."""


class ToyTextPipeline:
    def __init__(self, model: ToyEncoder) -> None:
        self.encoders = {"words": (model, None)}

    def load_embeddings(self, file: Path, token_strings: Sequence[str]) -> None:
        raise NotImplementedError("the toy learns no token rows")

    def load_lora(self, file: Path) -> None:
        """Nothing of a file is for the encoder."""

    def read(
        self,
        prompts: Sequence[str],
        length: int,
        *,
        scale: float = 1.0,
        cached: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> list[PromptEmbeds]:
        model, _ = self.encoders["words"]
        vectors = [model(word_ids(prompt)[None]) for prompt in prompts]
        return [PromptEmbeds(vec[:, None], vec) for vec in vectors]


class ToyImagePipeline:
    def __init__(self, base: Base, transformer: Any) -> None:
        self.base, self.transformer = base, transformer

    def load_lora(self, file: Path) -> None:
        described = json.loads(safetensors.read_metadata(file)["lora_adapter_metadata"])
        self.transformer.load_lora_adapter(load_file(file), prefix="transformer", metadata=described)

    def draw(
        self, prompt: PromptEmbeds, seeds: Sequence[int], *, steps: int, size: int, guidance: float, scale: float = 1.0
    ) -> list[Image.Image]:
        """Euler's method on the predicted velocity."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.base.folder, subfolder="scheduler")
        scheduler.set_timesteps(steps)
        pictures = []
        for seed in seeds:
            side = size // 8
            x = torch.randn(1, side * side, 3, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                for time in scheduler.timesteps:
                    velocity = self.transformer(x, prompt.vec, time[None] / 1000)
                    [x] = scheduler.step(velocity, time, x, return_dict=False)
            pixels = ((x[0].view(side, side, 3) / SCALING + SHIFT + 1) * 127.5).clamp(0, 255).to(torch.uint8)
            pictures.append(
                Image.fromarray(pixels.numpy().astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
            )
        return pictures


def word_ids(caption: str) -> Tensor:
    """[LENGTH]: a number for each word, then zeros."""
    ids = [1 + sum(word.encode()) % (WORDS - 1) for word in caption.split()][:LENGTH]
    return torch.tensor(ids + [0] * (LENGTH - len(ids)))


class ToyFamily:
    architecture = TOY
    layer_names = LayerNames(
        title="the toy",
        version="toy",
        network="networks.lora_toy",
        architecture=lambda guided: "toy/lora",
        implementation="nowhere",
        matrix_of=lambda module: next(((name, (own,)) for name, own in MATRICES.items() if own == module), None),
        modules_of=lambda matrix: (MATRICES[matrix],) if matrix in MATRICES else None,
        around=frozenset(),
    )

    def load_transformer(self, base: Base) -> nn.Module:
        return load_part(ToyTransformer, base, "transformer")

    def load_vae(self, base: Base) -> nn.Module:
        return ToyVae()

    def load_encoder(self, base: Base, encoder: str) -> nn.Module:
        return ToyEncoder(load_file(base.folder / encoder / "model.safetensors")["table"])

    def load_tokenizer(self, base: Base, encoder: str) -> Any:
        return None

    def token_ids(self, encoder: str, tokenizer: Any, caption: str, length: int) -> Tensor:
        return word_ids(caption)

    def embed(self, encoder: str, model: nn.Module, tokenizer: Any, ids: Tensor, pooling: str) -> Tensor:
        out: Tensor = model(ids)
        return out

    def prompt_embeds(self, embeddings: Mapping[str, Tensor]) -> PromptEmbeds:
        return PromptEmbeds(embeddings["words"][:, None], embeddings["words"])

    def recompute_encoder(self, encoder: str, model: nn.Module, *, save_activations: bool, projections: bool) -> None:
        """It has nothing to save."""

    def encode_image(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        mean = nn.functional.avg_pool2d(pixels.float() / 127.5 - 1, 8)  # [3, h, w]
        return torch.cat([mean, torch.full_like(mean, -30.0)])

    def latent_scale(self, base: Base) -> LatentScale:
        return LatentScale(SHIFT, SCALING)

    def pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def prepare_training(self, transformer: nn.Module, settings: TrainSettings) -> None:
        """It has nothing to recompute."""

    def end_training(self, transformer: nn.Module) -> None:
        """The same."""

    def predictor(self, transformer: nn.Module, guidance: float, device: torch.device, dtype: torch.dtype) -> Predict:
        def predict(noisy: NoisyBatch, prompts: PromptEmbeds, h: int, w: int) -> Tensor:
            out: Tensor = transformer(noisy.img.to(dtype), prompts.vec, noisy.timesteps)
            return out

        return predict

    def text_pipeline(self, base: Base, *, with_large: bool = True) -> ToyTextPipeline:
        return ToyTextPipeline(self.load_encoder(base, "words"))  # type: ignore[arg-type]

    def image_pipeline(self, base: Base, transformer: Any, *, with_vae: bool = True) -> ToyImagePipeline:
        return ToyImagePipeline(base, transformer)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a new family needs outside its own package: one entry without torch, one with it."""
    monkeypatch.setitem(architectures.ARCHITECTURES, TOY.transformer, TOY)
    monkeypatch.setitem(families.FAMILIES, TOY.name, ToyFamily())


def write_base(folder: Path) -> Path:
    """A base of this family with weights from a seed."""
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    ToyTransformer(WIDTH, HIDDEN).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "words").mkdir()
    save_file({"table": torch.randn(WORDS, WIDTH)}, folder / "words" / "model.safetensors")
    return folder
