"""FLUX.1 as diffusers stores it: its parts, its latent layout, its flow-matching objective.

The only file that knows the model library. Shapes: B batch, C = 16 latent channels, h x w latent height and width
(an eighth of the picture's), T text tokens; packed image tokens are 2 x 2 latent patches: [B, h*w/4, 4*C].
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runner import activations, hub, quant
from runner.attention import ON_A_GPU
from runner.basefiles import PARTS, fingerprint, local_folder
from runner.digest import key_of
from runner.errors import FluxrunError, Unreachable, disk_trouble
from runner.offload import spread

Generator = torch.Generator


@dataclass(frozen=True)
class Base:
    """A base model on this disk. `dtype` is the frozen parts' own; `device` is where they are loaded to. `quantize`: none, or
    what the transformer and T5 are held in; `cache`: the folder where they are kept so, if anywhere; `offload`: whether their
    blocks wait in host memory."""

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
    """Find the base on disk (`builtin:tiny`, a folder), or fetch its diffusers parts from the hub. Raises Unreachable where
    the hub does not answer, FluxrunError where it does not give them."""
    folder = local_folder(text)
    if folder is None:
        folder = _fetched(text, revision)
    return Base(folder, variant, device, dtype, quantize, cache, offload)


def _fetched(text: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", *(f"{part}/*" for part in PARTS)]  # not the single-file copies beside them
    try:
        hub.set_up_client(hub.ANSWER)
        return Path(snapshot_download(text, revision=revision, allow_patterns=wanted))
    except Exception as error:
        # The client has an exception for each way of not being answered, and passes on those of the libraries below it.
        if disk_trouble(error):
            raise
        if hub.passing(error):
            raise Unreachable(f"{text} cannot be fetched: the hub does not answer ({hub.told(error)})") from error
        raise FluxrunError(f"{text} cannot be fetched ({hub.told(error)}); `fluxrun check` says more") from error


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
    return spread(made, list(made.encoder.block), base.device) if base.offload else made  # type: ignore[no-any-return]


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
    return spread(made, blocks_of(made), base.device) if base.offload else made  # type: ignore[no-any-return]


def blocks_of(transformer: Any) -> list[nn.Module]:
    """In the order in which they run."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def set_attention(transformer: Any, backend: str) -> None:
    """Choose the transformer's attention by diffusers' name. Raises FluxrunError where this machine cannot do it."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if backend in ON_A_GPU and transformer.device.type != "cuda":
        raise FluxrunError(f"model.attention: {backend} needs an NVIDIA GPU (found {transformer.device}); use native")
    try:
        transformer.set_attention_backend(backend)
    except RuntimeError as error:
        raise FluxrunError(f"model.attention: {backend} cannot be used here ({error}); or use native") from error
    finally:  # diffusers makes it everyone's: the next run in this process, and pictures, have not asked for it
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def run_twice(transformer: Any, every: int) -> list[nn.Module]:
    """The blocks that gradient checkpointing of every n-th (0: of none) is for."""
    blocks = blocks_of(transformer)
    return [blocks[place] for place in activations.run_twice(len(blocks), every)]


def recompute(transformer: Any, blocks: Collection[nn.Module]) -> None:
    """Gradient checkpointing of these: their activations are made again in the backward pass."""
    chosen = {id(block) for block in blocks}

    def call(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False) if id(block) in chosen else block(*inputs)

    transformer.enable_gradient_checkpointing(call)


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
        key = key_of("quantized", quant.FORMAT, fingerprint(folder), base.variant, base.quantize, str(base.dtype))
        kept = base.cache / "quantized" / key[:2] / f"{key}.safetensors"
    return quant.fill(model, weight_files(folder, base.variant), base.quantize, base.dtype, base.device, kept)


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


# ---- latents -------------------------------------------------------------------------------------------------------


def encode_image(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Moments of the latent distribution. pixels [3, H, W] uint8 -> [2*C, h, w] (mean, log-variance)."""
    first = next(vae.parameters())
    scaled = (pixels.to(first.device, torch.float32) / 255 - 0.5) / 0.5
    with torch.no_grad():
        moments: Tensor = vae.encode(scaled[None].to(first.dtype)).latent_dist.parameters  # type: ignore[operator]
    return moments[0].cpu()


@dataclass(frozen=True)
class LatentScale:
    """FLUX's affine map from the VAE's latents to what the transformer sees: (z - shift) * scaling."""

    shift: float
    scaling: float

    @classmethod
    def of(cls, base: Base) -> LatentScale:
        config = json.loads((base.folder / "vae" / "config.json").read_text())
        return cls(config["shift_factor"], config["scaling_factor"])


def draw_latents(moments: Tensor, scale: LatentScale, generator: Generator) -> Tensor:
    """Sample the VAE's posterior. moments [B, 2*C, h, w] -> latents [B, C, h, w], fp32."""
    mean, logvar = moments.float().chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    noise = torch.randn(mean.shape, generator=generator)
    return (mean + std * noise - scale.shift) * scale.scaling


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h*w/4, 4*C]: 2 x 2 patches, channel first within a patch (FluxPipeline's order)."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def image_ids(h: int, w: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Positions of the packed tokens of an h x w latent: [h*w/4, 3] = (0, row, column)."""
    ids = torch.zeros(h // 2, w // 2, 3)
    ids[..., 1] += torch.arange(h // 2)[:, None]
    ids[..., 2] += torch.arange(w // 2)[None, :]
    return ids.reshape(-1, 3).to(device, dtype)


# ---- flow matching -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighting:
    """How timesteps are drawn and weighed. scheme: none, sigma_sqrt, logit_normal, mode, cosmap (SD3 paper, sec. 3.1)."""

    scheme: str
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29


@dataclass(frozen=True)
class Noised:
    """One micro-batch on its way through the transformer. sigmas [B, 1, 1] in (0, 1]; the rest packed [B, N, 4*C]."""

    img: Tensor
    target: Tensor
    sigmas: Tensor
    timesteps: Tensor  # [B], in 0..1 as the transformer takes them


class Flow:
    """Rectified flow as the reference trains it: x = (1 - sigma) z + sigma eps, target eps - z."""

    def __init__(self, base: Base, weighting: Weighting) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base.folder, subfolder="scheduler")
        self.timesteps: Tensor = scheduler.timesteps  # [1000], descending
        self.sigmas: Tensor = scheduler.sigmas[: len(self.timesteps)]
        self.weighting = weighting

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Indices into the schedule, [count]."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        own = self.weighting
        u: Tensor = compute_density_for_timestep_sampling(
            own.scheme, count, logit_mean=own.mean, logit_std=own.std, mode_scale=own.scale, generator=generator
        )
        return (u * len(self.timesteps)).long().clamp(max=len(self.timesteps) - 1)

    def noise(self, latents: Tensor, indices: Tensor, generator: Generator) -> Noised:
        """latents [B, C, h, w] fp32, indices [B]."""
        return mix(latents, self.sigmas[indices], self.timesteps[indices] / 1000, generator)

    def errors(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Weighted squared error, a mean per picture; [B], fp32."""
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        weights: Tensor = compute_loss_weighting_for_sd3(self.weighting.scheme, noised.sigmas)
        return (weights.float() * (prediction.float() - noised.target.float()) ** 2).flatten(1).mean(1)


def mix(latents: Tensor, sigmas: Tensor, timesteps: Tensor, generator: Generator) -> Noised:
    """latents [B, C, h, w] fp32; sigmas, timesteps [B], in 0..1."""
    eps = torch.randn(latents.shape, generator=generator)
    part = sigmas.view(-1, 1, 1)
    z, eps = pack(latents), pack(eps)
    return Noised((1 - part) * z + part * eps, eps - z, part, timesteps)


def stack(parts: Sequence[Noised]) -> Noised:
    """Several micro-batches of one size as one."""
    return Noised(
        torch.cat([part.img for part in parts]),
        torch.cat([part.target for part in parts]),
        torch.cat([part.sigmas for part in parts]),
        torch.cat([part.timesteps for part in parts]),
    )


@dataclass(frozen=True)
class Text:
    """What the transformer reads. txt [B, T, t5 width], vec [B, clip width]."""

    txt: Tensor
    vec: Tensor


Predict = Callable[[Noised, Text, int, int], Tensor]


def predictor(transformer: nn.Module, guidance: float, device: torch.device, dtype: torch.dtype) -> Predict:
    """The transformer's velocity prediction: (noised, text, latent height, latent width) -> [B, N, 4*C].

    Bases without a guidance embedding (FLUX.1-schnell) are told no guidance. What only depends on the shape is made once.
    """
    guided = bool(transformer.config.guidance_embeds)  # type: ignore[union-attr]

    @functools.cache
    def ids(length: int, h: int, w: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(length, 3, device=device, dtype=dtype), image_ids(h, w, device, dtype)

    @functools.cache
    def told(count: int) -> Tensor | None:
        return torch.full((count,), guidance, device=device) if guided else None

    def predict(noised: Noised, text: Text, h: int, w: int) -> Tensor:
        count, length = text.txt.shape[:2]
        txt_ids, img_ids = ids(length, h, w)
        with rotary_of(transformer, (length, h, w)):
            out: Tensor = transformer(
                hidden_states=noised.img.to(dtype),
                timestep=noised.timesteps,
                guidance=told(count),
                pooled_projections=text.vec,
                encoder_hidden_states=text.txt,
                txt_ids=txt_ids,
                img_ids=img_ids,
                return_dict=False,
            )[0]
        return out

    return predict


class Rotary(nn.Module):
    """The transformer's own position embedding, which it computes in every forward pass, kept per shape while the caller
    says which shape that is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.shape: tuple[int, int, int] | None = None
        self.tables: dict[tuple[int, int, int], Any] = {}

    def forward(self, ids: Tensor) -> Any:
        if self.shape is None:  # stock diffusers draws
            return self.inner(ids)
        if self.shape not in self.tables:
            self.tables[self.shape] = self.inner(ids)
        return self.tables[self.shape]


def forget_shapes(transformer: nn.Module) -> None:
    """Drop what was kept per shape."""
    assert isinstance(transformer.pos_embed, Rotary)
    transformer.pos_embed.tables.clear()


@contextmanager
def rotary_of(transformer: nn.Module, shape: tuple[int, int, int]) -> Iterator[None]:
    """Within, the ids are those of this (text length, latent height, latent width)."""
    rotary = transformer.pos_embed
    if not isinstance(rotary, Rotary):  # a transformer that was made elsewhere
        yield
        return
    rotary.shape = shape
    try:
        yield
    finally:
        rotary.shape = None
