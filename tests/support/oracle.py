"""A second trainer, to hold the first one against: plain, slow and obvious, and without a line of fluxrun in it.

It reads a spec, the pictures and captions, and a base in diffusers' layout, and trains in one process on the CPU with
stock torch, diffusers, transformers and peft. Nothing is cached, fused, recomputed or resumed. Every formula is written
out here from its source, every random draw from `docs/randomness.md`. The linter forbids an import of `runner` in this
file.

Shapes: B pictures of a batch, C = 16 latent channels, h x w latent height and width, T tokens that T5 reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from peft import LoraConfig
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
CONTEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
PRESETS = {"attention": ATTENTION, "attention+mlp": ATTENTION + CONTEXT + FEED_FORWARD}
BUCKET_RATIOS = ((1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1))
EVAL_SIGMAS = [tenth / 10 for tenth in range(1, 10)]


@dataclass
class Step:
    """What one optimisation step did. pictures: names, in the order of the step's batches; sigmas: one per picture,
    class images behind each batch's own; lr: by kind of parameter."""

    pictures: list[str]
    captions: list[str]
    sigmas: list[float]
    lr: dict[str, float]
    loss: float
    grad_norm: float
    eval_loss: float | None = None


@dataclass
class Trained:
    """tensors: as `Oracle.tensors` gives them, after the last step."""

    steps: list[Step] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


# ---- the rule for random draws (docs/randomness.md) ------------------------------------------------------------------


def seed_of(seed: int, *words: str | int) -> int:
    text = "\x1f".join(str(word) for word in (seed, *words))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_of(seed: int, *words: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, *words))


def endless_epochs(seed: int, stream: str, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(index, epoch): shuffled epochs laid end to end; index i stands counts[i] times in each."""
    epoch = 0
    while True:
        order = [index for index, count in enumerate(counts) for _ in range(count)]
        random.Random(seed_of(seed, stream, epoch)).shuffle(order)
        for index in order:
            yield index, epoch
        epoch += 1


def batches(
    seed: int, stream: str, counts: Mapping[tuple[int, int], int], images: int
) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """(size, [(index within the size's views, epoch)]) of one batch after another, each of one size."""
    sizes = list(counts)
    turns = endless_epochs(seed, f"{stream}/sizes", [counts[size] for size in sizes])
    views = {size: endless_epochs(seed, f"{stream}/{place}", [1] * counts[size]) for place, size in enumerate(sizes)}
    for turn, _ in turns:
        yield sizes[turn], [next(views[sizes[turn]]) for _ in range(images)]


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    name: str
    path: Path
    caption: str


def read_pictures(folder: Path, prompt: str | None) -> list[Picture]:
    """PNG files by name; the caption beside each, else the prompt."""
    found = []
    for path in sorted(folder.glob("*.png")):
        side = path.with_suffix(".txt")
        caption = " ".join(side.read_text().split()) if side.exists() else ""
        found.append(Picture(path.name, path, caption or prompt or ""))
    return found


def bucket_sizes(side: int) -> list[tuple[int, int]]:
    """Multiples of 16 of about side * side pixels, a (width, height) per aspect ratio."""
    sizes = []
    for wide, high in BUCKET_RATIOS:
        height = math.sqrt(side * side * high / wide)
        size = tuple(max(16, round(length / 16) * 16) for length in (height * wide / high, height))
        if size not in sizes:
            sizes.append(size)
    return sizes  # type: ignore[return-value]


def size_of(picture: Picture, side: int, buckets: bool) -> tuple[int, int]:
    """The size that a picture is trained at: the square, or the last of the nearest buckets (diffusers' measure)."""
    if not buckets:
        return side, side
    with Image.open(picture.path) as opened:
        width, height = opened.size
    distances = [(abs(height * wide - width * high), size) for size in bucket_sizes(side) for wide, high in [size]]
    nearest = min(distance for distance, _ in distances)
    return [size for distance, size in distances if distance == nearest][-1]


def pixels_of(
    picture: Picture, size: tuple[int, int], variant: int | None, data: Mapping[str, Any], seed: int
) -> Tensor:
    """[3, H, W] in -1..1: resized to cover, cropped, perhaps mirrored. variant None: the middle, as it is."""
    wide, high = size
    with Image.open(picture.path) as opened:
        image = opened.convert("RGB")
    scale = max(wide / image.width, high / image.height)
    covering = max(wide, round(image.width * scale)), max(high, round(image.height * scale))
    image = image.resize(covering, Image.Resampling.LANCZOS)
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    if variant is not None and not data["center_crop"]:
        draw = random.Random(seed_of(seed, "crop", picture.name, variant))
        left, top = draw.randint(0, image.width - wide), draw.randint(0, image.height - high)
    image = image.crop((left, top, left + wide, top + high))
    if variant is not None and data["random_flip"] and (seed_of(seed, "flip", picture.name) + variant) % 2 == 1:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


# ---- schedules and densities -----------------------------------------------------------------------------------------


def lr_factor(schedule: Mapping[str, Any], step: int, steps: int) -> float:
    """diffusers' get_scheduler (optimization.py), written out; `step` counts the updates made before this one."""
    name: str = schedule["name"]
    warmup: int = schedule["warmup"]
    if name == "constant":
        return 1.0
    if step < warmup:
        return step / max(1, warmup)
    if name == "constant_with_warmup":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    if name == "linear":
        return max(0.0, 1 - progress)
    if name == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    if name == "cosine_with_restarts":
        return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * ((schedule["cycles"] * progress) % 1)))
    assert name == "polynomial"
    end = 1e-7  # diffusers' lr_end, of an initial rate of 1
    return end if step > steps else (1 - end) * (1 - progress) ** schedule["power"] + end


def draw_density(weighting: Mapping[str, Any], generator: torch.Generator) -> float:
    """u in 0..1 (SD3 paper, section 3.1); the timestep is the one at index 1000 u, from the noisy end."""
    if weighting["scheme"] == "logit_normal":
        return float(torch.sigmoid(torch.normal(weighting["mean"], weighting["std"], (1,), generator=generator)))
    u = float(torch.rand(1, generator=generator))
    if weighting["scheme"] == "mode":
        u = 1 - u - weighting["scale"] * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def loss_weight(scheme: str, sigma: float) -> float:
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return 1.0


# ---- the trainer -----------------------------------------------------------------------------------------------------


def resolved(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The spec's tables with the defaults of docs/keys.md."""
    spec: dict[str, Any] = {name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()}
    defaults: dict[str, dict[str, Any]] = {
        "model": {"dtype": "fp32", "max_sequence_length": 512},
        "data": {"prompt": None, "repeats": 1, "resolution": 512, "buckets": False, "center_crop": False,
                 "random_flip": False, "caption_dropout": 0.0, "holdout": 0},
        "lora": {"rank": 16, "dropout": 0.0, "layers": "attention", "until": 1.0},
        "train": {"batch_size": 1, "accumulate": 1, "scale_lr": False, "guidance": 3.5, "max_grad_norm": 1.0},
        "optimizer": {"name": "adamw", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-4},
        "schedule": {"name": "constant", "warmup": 0, "cycles": 1, "power": 1.0},
        "inversion": {"encoders": ["clip"], "weight_decay": 1e-3, "pooling": "diffusers"},
        "validate": {"every": None, "loss": True},
        "compute": {"gpus": 1},
    }  # fmt: skip
    for name, values in defaults.items():
        spec[name] = values | spec.get(name, {})
    spec.setdefault("seed", 0)
    spec.setdefault("tokens", [])
    data, train, lora = spec["data"], spec["train"], spec["lora"]
    data.setdefault("variants", 1 if data["center_crop"] and not data["random_flip"] else 4)
    train.setdefault("lr", 1.0 if spec["optimizer"]["name"] == "prodigy" else 1e-4)
    weighting = {"scheme": "none", "mean": 0.0, "std": 1.0, "scale": 1.29}
    train["weighting"] = weighting | train.get("weighting", {})
    lora.setdefault("alpha", lora["rank"])
    spec["inversion"].setdefault("until", 1.0 if lora["until"] == 0 else 0.5)
    spec["inversion"].setdefault("lr", train["lr"])
    if "text_lora" in spec:
        text_lora = {"rank": 16, "until": 1.0, "lr": train["lr"]} | spec["text_lora"]
        spec["text_lora"] = {"alpha": text_lora["rank"]} | text_lora
    if "prior" in spec:
        spec["prior"] = {"count": 100, "weight": 1.0} | spec["prior"]
    return spec


class PictureDropout(nn.Module):
    """Dropout that draws for the picture's tokens alone, which stand behind `text` tokens: of the last block's text
    tokens nothing is used but keys and values."""

    def __init__(self, p: float, text: int) -> None:
        super().__init__()
        self.p, self.text = p, text

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T + N, width]"""
        picture = nn.functional.dropout(x[:, self.text :], self.p, self.training)
        return torch.cat([x[:, : self.text], picture], dim=1)


class Oracle:
    def __init__(self, spec_file: Path, base: Path) -> None:
        """base: the folder of the spec's model.base."""
        self.spec = resolved(tomllib.loads(spec_file.read_text()))
        self.base, self.seed = base, self.spec["seed"]
        self.dtype = DTYPES[self.spec["model"]["dtype"]]
        data = self.spec["data"]
        pictures = read_pictures(spec_file.parent / data["source"], data["prompt"])
        by_lot = sorted(pictures, key=lambda picture: seed_of(0, "holdout", picture.name))[: data["holdout"]]
        self.held = [picture for picture in pictures if picture in by_lot]
        self.pictures = [picture for picture in pictures if picture not in by_lot]
        self.classes: list[Picture] = []
        if "prior" in self.spec:
            own = self.spec["prior"]
            folder = spec_file.parent / own["images"]
            self.classes = read_pictures(folder, own["prompt"])[: own["count"]]
        self.groups = self.grouped(self.pictures)
        self.place_tokens()
        self.load()

    def grouped(self, pictures: Sequence[Picture]) -> dict[tuple[int, int], list[Picture]]:
        data = self.spec["data"]
        sides = data["resolution"] if isinstance(data["resolution"], list) else [data["resolution"]]
        found: dict[tuple[int, int], list[Picture]] = {}
        for side in sides:
            for picture in pictures:
                found.setdefault(size_of(picture, side, data["buckets"]), []).append(picture)
        return {size: found[size] for size in sorted(found)}

    def place_tokens(self) -> None:
        """Which vocabulary entries stand for which token: <s0>, <s1>, ... over all tokens in the spec's order."""
        self.entries: dict[str, list[str]] = {}
        number = 0
        for token in self.spec["tokens"]:
            vectors = token.get("vectors", 2)
            self.entries[token["name"]] = [f"<s{number + index}>" for index in range(vectors)]
            number += vectors

    def load(self) -> None:
        self.transformer = FluxTransformer2DModel.from_pretrained(
            self.base, subfolder="transformer", torch_dtype=self.dtype
        )
        self.transformer.requires_grad_(False).train()
        # FLUX's VAE overflows in fp16 (its config says force_upcast), so it encodes in fp32 there
        vae_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        self.vae = AutoencoderKL.from_pretrained(self.base, subfolder="vae", torch_dtype=vae_dtype).eval()
        self.encoders: dict[str, Any] = {
            "clip": CLIPTextModel.from_pretrained(self.base, subfolder="text_encoder", dtype=self.dtype),
            "t5": T5EncoderModel.from_pretrained(self.base, subfolder="text_encoder_2", dtype=self.dtype),
        }
        for encoder in self.encoders.values():
            encoder.requires_grad_(False).eval()
        self.tokenizers: dict[str, Any] = {
            "clip": AutoTokenizer.from_pretrained(self.base, subfolder="tokenizer"),
            "t5": AutoTokenizer.from_pretrained(self.base, subfolder="tokenizer_2"),
        }
        self.first_new = {name: len(tokenizer) for name, tokenizer in self.tokenizers.items()}
        self.rows: dict[str, nn.Parameter] = {}
        for name in self.spec["inversion"]["encoders"] if self.spec["tokens"] else []:
            self.rows[name] = nn.Parameter(self.initial_rows(name))
            self.tokenizers[name].add_tokens([entry for entries in self.entries.values() for entry in entries])
        self.lora = self.add_lora()
        self.text_lora = self.add_text_lora() if "text_lora" in self.spec else {}

    # ---- what learns -------------------------------------------------------------------------------------------------

    def table(self, name: str) -> Tensor:
        weight: Tensor = self.encoders[name].get_input_embeddings().weight
        return weight

    def initial_rows(self, name: str) -> Tensor:
        """Normal, with the table's standard deviation; an initializer's own embeddings come first where there is
        one."""
        table, out = self.table(name).float(), []
        for index, token in enumerate(self.spec["tokens"]):
            vectors = token.get("vectors", 2)
            drawn = torch.randn(vectors, table.shape[1], generator=generator_of(self.seed, "rows", name, index))
            drawn = drawn * table.std().item()
            if phrase := token.get("initializer"):
                ids = self.tokenizers[name](phrase, add_special_tokens=False).input_ids[:vectors]
                drawn[: len(ids)] = table[ids]
            out.append(drawn)
        return torch.cat(out)

    def add_lora(self) -> dict[str, nn.Parameter]:
        own = self.spec["lora"]
        if own["until"] == 0:
            return {}
        suffixes = PRESETS[own["layers"]] if isinstance(own["layers"], str) else own["layers"]
        layers = [
            name
            for name, module in self.transformer.named_modules()
            if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)
        ]
        config = LoraConfig(r=own["rank"], lora_alpha=own["alpha"], lora_dropout=own["dropout"], target_modules=layers)
        self.transformer.add_adapter(config)
        last = self.transformer.single_transformer_blocks[-1]
        for layer in (last.attn.to_q, last.proj_mlp, last.proj_out):
            if own["dropout"] > 0 and hasattr(layer, "lora_dropout"):
                text = self.spec["model"]["max_sequence_length"]
                layer.lora_dropout["default"] = PictureDropout(own["dropout"], text)
        return self.drawn(self.transformer, own["rank"])

    def add_text_lora(self) -> dict[str, nn.Parameter]:
        own = self.spec["text_lora"]
        names = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
        config = LoraConfig(r=own["rank"], lora_alpha=own["alpha"], target_modules=names)
        self.encoders["clip"].add_adapter(config)
        return self.drawn(self.encoders["clip"], own["rank"])

    def drawn(self, model: nn.Module, rank: int) -> dict[str, nn.Parameter]:
        """Each A drawn anew from its own seed, normal with standard deviation 1 / rank; each B zero; both fp32."""
        found = {}
        for name, parameter in model.named_parameters():
            if ".lora_A." not in name and ".lora_B." not in name:
                continue
            plain = name.replace(".default.weight", ".weight")
            parameter.data = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                drawn = torch.randn(parameter.shape, generator=generator_of(self.seed, "lora", plain))
                parameter.data = drawn / rank
            parameter.requires_grad_(True)
            found[plain] = parameter
        return found

    # ---- text --------------------------------------------------------------------------------------------------------

    def expanded(self, caption: str) -> str:
        for name in sorted(self.entries, key=len, reverse=True):
            pattern = rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])"
            caption = re.sub(pattern, "".join(self.entries[name]), caption)
        return caption

    def encode(self, name: str, caption: str, pooling: str) -> Tensor:
        """[T, width] of T5, [width] of CLIP."""
        encoder, tokenizer = self.encoders[name], self.tokenizers[name]
        length = self.spec["model"]["max_sequence_length"] if name == "t5" else 77
        ids = tokenizer(
            [self.expanded(caption)], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        weights = {}
        if name in self.rows:  # the whole table again, with the learned rows in the new tokens' places
            first, rows, table = self.first_new[name], self.rows[name], self.table(name)
            whole = torch.cat([table[:first], rows.to(table.dtype), table[first + len(rows) :]])
            every = encoder.named_parameters(remove_duplicate=False)  # T5 names its table twice
            weights = {key: whole for key, value in every if value is table}
        out = torch.func.functional_call(encoder, weights, (ids,), tie_weights=True)
        if name == "t5":
            return out.last_hidden_state[0]  # type: ignore[no-any-return]
        if pooling == "diffusers":  # wherever transformers pools
            return out.pooler_output[0]  # type: ignore[no-any-return]
        end = (ids[0] == tokenizer.eos_token_id).nonzero()[0, 0]
        return out.last_hidden_state[0, end]  # type: ignore[no-any-return]

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def moments(self, picture: Picture, size: tuple[int, int], variant: int | None) -> Tensor:
        """Mean and log-variance of the latents, [2 C, h, w]."""
        image = pixels_of(picture, size, variant, self.spec["data"], self.seed)
        with torch.no_grad():
            out: Tensor = self.vae.encode(image[None].to(self.vae.dtype)).latent_dist.parameters[0]
        return out.float()

    def scaled(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        scaled: Tensor = (latents - config.shift_factor) * config.scaling_factor
        return scaled

    def sigma_at(self, index: int) -> float:
        """Of the scheduler's 1000, from 1 down; FLUX.1-dev's are even (its shift is dynamic, and for sampling
        alone)."""
        config = json.loads((self.base / "scheduler" / "scheduler_config.json").read_text())
        sigma, shift = (1000 - index) / 1000, 1.0 if config["use_dynamic_shifting"] else config["shift"]
        return shift * sigma / (1 + (shift - 1) * sigma)

    def velocity(self, noisy: Tensor, sigmas: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
        """noisy [B, C, h, w] -> the prediction, as latents of the same shape."""
        b, c, h, w = noisy.shape
        packed = noisy.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        ids = torch.zeros(h // 2, w // 2, 3)
        ids[..., 1], ids[..., 2] = torch.arange(h // 2)[:, None], torch.arange(w // 2)[None]
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            out = self.transformer(
                hidden_states=packed.to(self.dtype),
                timestep=sigmas,
                guidance=torch.full((b,), float(self.spec["train"]["guidance"])),
                pooled_projections=vec,
                encoder_hidden_states=txt,
                txt_ids=torch.zeros(txt.shape[1], 3),
                img_ids=ids.reshape(-1, 3),
            ).sample.float()
        return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)  # type: ignore[no-any-return]

    def read(self, captions: Sequence[str], pooling: str) -> tuple[Tensor, Tensor]:
        return tuple(  # type: ignore[return-value]
            torch.stack([self.encode(name, caption, pooling) for caption in captions]) for name in ("t5", "clip")
        )

    def micro_batch_loss(self, step: int, place: int, size: tuple[int, int], shown: list[tuple[int, int]],
                         class_shown: list[int], seen: Step) -> Tensor:  # fmt: skip
        """place: the micro-batch's number within the step, over all processes."""
        data, train, count = self.spec["data"], self.spec["train"], self.spec["train"]["batch_size"]
        views: list[tuple[Picture, int | None, str, int]] = []  # picture, variant, caption, seed of its noise
        group = self.groups[size]
        for at, (index, epoch) in enumerate(shown):
            picture, number = group[index % len(group)], place * count + at
            times = epoch * data["repeats"] + index // len(group)
            variant = (seed_of(self.seed, "variant", picture.name) + times) % data["variants"]
            lot = random.Random(seed_of(self.seed, "caption", step, number)).random()
            caption = "" if lot < data["caption_dropout"] else picture.caption
            views.append((picture, variant, caption, seed_of(self.seed, "noise", step, number)))
        for at, index in enumerate(class_shown):
            noise = seed_of(self.seed, "class-noise", step, place * count + at)
            views.append((self.classes[index], None, self.spec["prior"]["prompt"], noise))
        noisy, targets, sigmas = [], [], []
        for picture, variant, caption, noise in views:
            generator = torch.Generator().manual_seed(noise)
            mean, logvar = self.moments(picture, size, variant).chunk(2)
            spread = torch.exp(0.5 * logvar.clamp(-30, 20))
            z = self.scaled(mean + spread * torch.randn((1, *mean.shape), generator=generator)[0])
            index = min(999, int(draw_density(train["weighting"], generator) * 1000))
            sigma = self.sigma_at(index)
            eps = torch.randn((1, *z.shape), generator=generator)[0]
            noisy.append((1 - sigma) * z + sigma * eps)
            targets.append(eps - z)
            sigmas.append(sigma)
            seen.pictures.append(picture.name)
            seen.captions.append(caption)
        seen.sigmas += sigmas
        pooling = self.spec["inversion"]["pooling"]
        if pooling == "both":
            pooling = random.Random(seed_of(self.seed, "pooling", step, place)).choice(("diffusers", "eos"))
        txt, vec = self.read([caption for _, _, caption, _ in views], pooling)
        torch.manual_seed(seed_of(self.seed, "dropout", step, place))
        predicted = self.velocity(torch.stack(noisy), torch.tensor(sigmas), txt, vec)
        weights = torch.tensor([loss_weight(train["weighting"]["scheme"], sigma) for sigma in sigmas])
        errors = weights * (predicted - torch.stack(targets)).square().mean((1, 2, 3))
        loss = errors[:count].mean()
        return loss + self.spec["prior"]["weight"] * errors[count:].mean() if self.classes else loss

    def eval_loss(self) -> float:
        """The mean over nine sigmas, unweighted: every held-out picture at each; with none held out, sigma number i at
        training picture i, in turn. Noise by the picture's name and the sigma alone."""
        chosen = self.held or self.pictures[: len(EVAL_SIGMAS)]
        pooling = "eos" if self.spec["inversion"]["pooling"] == "eos" else "diffusers"
        found: dict[float, list[float]] = {sigma: [] for sigma in EVAL_SIGMAS}
        first_size: dict[str, tuple[int, int]] = {}
        for size, pictures in self.grouped(chosen).items():
            for picture in pictures:
                first_size.setdefault(picture.name, size)
        self.transformer.eval()
        for at, picture in enumerate(chosen):
            mean = self.scaled(self.moments(picture, first_size[picture.name], None).chunk(2)[0])
            for sigma in EVAL_SIGMAS if self.held else EVAL_SIGMAS[at :: len(chosen)]:
                eps = torch.randn((1, *mean.shape), generator=generator_of(0, "eval", picture.name, str(sigma)))[0]
                with torch.no_grad():
                    txt, vec = self.read([picture.caption], pooling)
                    noisy = (1 - sigma) * mean + sigma * eps
                    predicted = self.velocity(noisy[None], torch.tensor([sigma]), txt, vec)[0]
                found[sigma].append(float((predicted - (eps - mean)).square().mean()))
        self.transformer.train()
        return sum(sum(losses) / len(losses) for losses in found.values()) / len(found)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def kinds(self) -> dict[str, tuple[dict[str, nn.Parameter], float, float, int]]:
        """Kind -> (parameters, learning rate, weight decay, steps that it learns)."""
        spec, steps = self.spec, self.spec["train"]["steps"]
        decay, rows = spec["optimizer"]["weight_decay"], spec["inversion"]
        kinds = {"lora": (self.lora, spec["train"]["lr"], decay, math.ceil(spec["lora"]["until"] * steps))}
        if self.rows:
            kinds["rows"] = (self.rows, rows["lr"], rows["weight_decay"], math.ceil(rows["until"] * steps))
        if self.text_lora:
            own = spec["text_lora"]
            kinds["text_lora"] = (self.text_lora, own["lr"], decay, math.ceil(own["until"] * steps))
        return {kind: value for kind, value in kinds.items() if value[0]}

    def optimizer(self, kinds: Mapping[str, Any], scale: int) -> torch.optim.Optimizer:
        own = self.spec["optimizer"]
        groups = [
            {"params": list(parameters.values()), "lr": lr * scale, "weight_decay": decay, "kind": kind}
            for kind, (parameters, lr, decay, _) in kinds.items()
        ]
        betas = own["beta1"], own["beta2"]
        if own["name"] == "prodigy":
            from prodigyopt import Prodigy

            chosen = {name: own[name] for name in ("d_coef", "d0", "beta3", "growth_rate") if name in own}
            return Prodigy(  # type: ignore[no-any-return]
                groups, betas=betas, eps=own["eps"], weight_decay=own["weight_decay"], decouple=own.get("decouple", True),
                use_bias_correction=own.get("bias_correction", True), safeguard_warmup=own.get("safeguard_warmup", True),
                **chosen,
            )  # fmt: skip
        if own["name"] == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, betas=betas, eps=own["eps"])  # type: ignore[no-any-return]
        return torch.optim.AdamW(groups, betas=betas, eps=own["eps"], foreach=False)

    def train(self) -> Trained:
        spec, train = self.spec, self.spec["train"]
        gpus, images, kinds = spec["compute"]["gpus"], train["batch_size"], self.kinds()
        each = train["accumulate"] * gpus
        optimizer = self.optimizer(kinds, images * each if train["scale_lr"] else 1)
        rates = {group["kind"]: group["lr"] for group in optimizer.param_groups}
        scaler = torch.amp.GradScaler("cpu", enabled=self.dtype == torch.float16)
        counts = {size: len(group) * spec["data"]["repeats"] for size, group in self.groups.items()}
        own_batches = batches(self.seed, "order", counts, images)
        last = max(stop for _, _, _, stop in kinds.values())
        out, class_batches = Trained(), self.class_batches(images)
        for step in range(last):
            for group in list(optimizer.param_groups):  # what has learned long enough is left as it is
                if step >= kinds[group["kind"]][3]:
                    optimizer.param_groups.remove(group)
                    for parameter in group["params"]:
                        parameter.requires_grad_(False)
            seen, loss = Step([], [], [], {}, 0.0, 0.0), torch.zeros(())
            for place in range(each):
                size, shown = next(own_batches)
                part = self.micro_batch_loss(step, place, size, shown, next(class_batches), seen) / each
                scaler.scale(part).backward()
                loss = loss + part.detach()
            learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(learning, train["max_grad_norm"], foreach=False)
            for group in optimizer.param_groups:
                group["lr"] = rates[group["kind"]] * lr_factor(spec["schedule"], step, last)
            if math.isfinite(float(loss)) and math.isfinite(float(norm)):
                optimizer.step()
                self.keep_row_size(step, kinds)
            optimizer.zero_grad()
            scaler.update()
            # Prodigy's rate in force is lr times its estimate d
            seen.lr = {group["kind"]: float(group["lr"] * group.get("d", 1.0)) for group in optimizer.param_groups}
            seen.loss, seen.grad_norm = float(loss), float(norm)
            every = spec["validate"]["every"]
            if spec["validate"]["loss"] and (step + 1 == last or (every and (step + 1) % every == 0)):
                seen.eval_loss = self.eval_loss()
            out.steps.append(seen)
        out.tensors = self.tensors()
        return out

    def tensors(self) -> dict[str, Tensor]:
        """A copy of everything that learns, as it is now: "lora/MODULE.lora_A.weight", "rows/clip",
        "text_lora/MODULE..."."""
        named: dict[str, Mapping[str, Tensor]] = {"lora": self.lora, "rows": self.rows, "text_lora": self.text_lora}
        return {f"{kind}/{name}": value.detach().clone() for kind in named for name, value in named[kind].items()}

    def class_batches(self, images: int) -> Iterator[list[int]]:
        if not self.classes:
            while True:
                yield []
        drawn = batches(self.seed, "class", {(0, 0): len(self.classes)}, images)
        for _, shown in drawn:
            yield [index for index, _ in shown]

    def keep_row_size(self, step: int, kinds: Mapping[str, Any]) -> None:
        """While rows learn: a tenth of the way back to the table's standard deviation, after each update."""
        if "rows" not in kinds or step >= kinds["rows"][3]:
            return
        with torch.no_grad():
            for name, rows in self.rows.items():
                rows.mul_((self.table(name).float().std() / rows.std()) ** 0.1)
