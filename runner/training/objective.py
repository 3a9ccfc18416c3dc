"""The training loss, and the eval loss that runs are compared by: flow matching on random and on fixed noise.

Shapes: B pictures, C latent channels, h x w latent height and width, N image tokens of D numbers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runner.core.seeds import derive
from runner.data import buckets
from runner.data.buckets import CropView, Size
from runner.model import flow_matching
from runner.model.device import autocast, pin_memory, to_device
from runner.model.family import PromptEmbeds
from runner.model.latents import draw_latents, mean_latents
from runner.training.context import EVAL_SIGMAS, RunContext
from runner.training.encoders import CachedEncoder, encode_latents
from runner.training.live_encoder import LiveEncoder
from runner.training.prefetch import Prefetcher

Encoders = Mapping[str, LiveEncoder | CachedEncoder]


@dataclass(frozen=True)
class PreparedBatch:
    """A part of a micro-batch, in pinned host memory: pictures first, then the class images.

    texts: embeddings of the captions by encoder, from the cached ones. pooling: where pooled encoders read their
    vector. h, w: of the latents. images: how many are not class images. dropout: the seed of the adapters' dropout.
    """

    noised: flow_matching.NoisyBatch
    texts: Mapping[str, Tensor]
    captions: list[str]
    pooling: str
    h: int
    w: int
    images: int
    dropout: int


class FlowObjective:
    """The flow-matching loss of one micro-batch, as the reference script computes it.

    Every random number depends on (seed, step, index in the step's batch), so two micro-batches of two are one of four.
    """

    def __init__(self, context: RunContext, transformer: nn.Module, encoders: Encoders) -> None:
        """Reads the run's latents into memory; those that the cache lacks are encoded first."""
        spec, base = context.spec, context.base
        self.context, self.transformer, self.encoders = context, transformer, encoders
        self.moments = _read_moments(context)
        groups = context.pictures_by_size
        self.counts: dict[Size, int] = {size: len(group) * spec.data.repeats for size, group in groups.items()}
        self.family = context.family
        self.scale = self.family.latent_scale(base)
        weighting = flow_matching.Weighting(**spec.train.weighting.model_dump())
        self.flow = flow_matching.Flow(base, weighting, self.family.pack)
        self.predict = self.family.predictor(transformer, spec.train.guidance, base.device, base.dtype)
        self.prefetcher = Prefetcher(self.prepare, in_thread=base.device.type != "cpu")

    def close(self) -> None:
        """End the prefetching thread."""
        self.prefetcher.close()

    # ---- training --------------------------------------------------------------------------------------------------

    def batch(self, step: int, micro: int) -> list[tuple[CropView, str]]:
        """(view, caption) of each picture of a micro-batch; with prior preservation followed by as many class
        images."""
        spec, context = self.context.spec, self.context
        count, accumulate = spec.train.batch_size, spec.train.accumulate * context.ranks.count
        size, drawn = buckets.draw_batch(
            spec.seed, step, micro, images=count, accumulate=accumulate, counts=self.counts
        )
        group, batch = context.pictures_by_size[size], []
        for place, (index, epoch) in enumerate(drawn):
            picture = group[index % len(group)]
            showing = epoch * spec.data.repeats + index // len(group)  # how often it was shown before
            variant = buckets.variant(spec.seed, picture.name, showing, context.variants)
            dropout = random.Random(derive(spec.seed, "caption", step, micro * count + place))
            dropped = dropout.random() < spec.data.caption_dropout
            batch.append((CropView(picture, size, variant), "" if dropped else picture.caption))
        if spec.prior:
            counts = {size: len(context.class_pictures)}
            _, drawn = buckets.draw_batch(
                spec.seed, step, micro, images=count, accumulate=accumulate, counts=counts, what="class"
            )
            batch += [(CropView(context.class_pictures[index], size, None), spec.prior.prompt) for index, _ in drawn]
        return batch

    def prepare(self, step: int, micro: int) -> PreparedBatch:
        """Everything of a part of a micro-batch that needs no device. micro: as in `loss`."""
        context, spec, device = self.context, self.context.spec, self.context.base.device
        whole, part = divmod(micro, context.micro_batch_parts)
        whole = whole * context.ranks.count + context.ranks.rank
        count, parts = spec.train.batch_size, context.micro_batch_parts
        places = range(count)[part * count // parts : (part + 1) * count // parts]  # of the pictures in the micro-batch
        batch = self.batch(step, whole)
        chosen = [*places, *(count + place for place in places)] if spec.prior else [*places]
        noised = []
        for place in chosen:
            kind, index = ("noise", place) if place < count else ("class-noise", place - count)
            generator = torch.Generator().manual_seed(derive(spec.seed, kind, step, whole * count + index))
            latents = draw_latents(self.moments[batch[place][0]][None], self.scale, generator)  # [1, C, h, w]
            noised.append(self.flow.add_noise(latents, self.flow.sample_timesteps(1, generator), generator))
        captions, pooling = [batch[place][1] for place in chosen], self._pooling(step, whole)
        texts = {
            name: pin_memory(encoder.look_up(captions, pooling), device)
            for name, encoder in self.encoders.items()
            if isinstance(encoder, CachedEncoder)
        }
        dropout = derive(spec.seed, "dropout", step, whole, *([part] if part else []))
        h, w = self.moments[batch[0][0]].shape[-2:]
        pinned = _map_tensors(flow_matching.collate(noised), lambda tensor: pin_memory(tensor, device))
        return PreparedBatch(pinned, texts, captions, pooling, h, w, len(places), dropout)

    def loss(self, step: int, micro: int) -> Tensor:
        """The loss of a part of a micro-batch, a scalar. micro: counts the parts, of which a step has accumulate *
        micro_batch_parts on each rank."""
        context, spec, device = self.context, self.context.spec, self.context.base.device
        last = micro + 1 == spec.train.accumulate * context.micro_batch_parts
        batch = self.prefetcher.get((step, micro), then=(step + 1, 0) if last else (step, micro + 1))
        noised = _map_tensors(batch.noised, lambda tensor: to_device(tensor, device))
        if spec.lora.dropout > 0:  # dropout can only draw from the global generator
            torch.manual_seed(batch.dropout)
        prompts = self.family.prompt_embeds({
            name: to_device(batch.texts[name], device)
            if name in batch.texts
            else encoder.embed(batch.captions, batch.pooling)
            for name, encoder in self.encoders.items()
        })  # fmt: skip
        with autocast(device, context.base.dtype):
            prediction = self.predict(noised, prompts, batch.h, batch.w)  # [B, N, D]
        losses = self.flow.loss_per_image(prediction, noised)  # [B]
        images, classes = losses[: batch.images], losses[batch.images :]
        return images.mean() + (spec.prior.weight * classes.mean() if spec.prior else 0.0)

    def _pooling(self, step: int, micro: int) -> str:
        pooling = self.context.spec.inversion.pooling
        if pooling != "both":
            return pooling
        return random.Random(derive(self.context.spec.seed, "pooling", step, micro)).choice(("diffusers", "eos"))

    def embed_prompts(self, captions: list[str], pooling: str) -> PromptEmbeds:
        """The captions' embeddings on the device, by encoders as they are now."""
        embeddings = {name: encoder.embed(captions, pooling) for name, encoder in self.encoders.items()}
        return self.family.prompt_embeds(embeddings)

    def post_step(self) -> None:
        """Called after each optimizer step."""
        for encoder in self.encoders.values():
            encoder.post_step()

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[float, float]:
        """The unweighted loss at each of nine fixed sigmas, averaged over the eval pictures.

        The noise depends on the picture's name and the sigma alone, so runs of any seed and weighting compare.
        """
        context = self.context
        points = context.eval_points
        totals, counts = dict.fromkeys(EVAL_SIGMAS, 0.0), Counter(sigma for _, sigmas in points for sigma in sigmas)
        pooling = "eos" if context.spec.inversion.pooling == "eos" else "diffusers"
        fits = context.spec.train.batch_size // context.micro_batch_parts  # pictures that are known to fit in memory
        self.transformer.eval()
        for view, sigmas in points:
            with torch.no_grad():
                prompt = self.embed_prompts([view.picture.caption], pooling)
            for start in range(0, len(sigmas), fits):
                losses = self._eval_losses(view, prompt, sigmas[start : start + fits])
                for sigma, loss in zip(sigmas[start : start + fits], losses, strict=True):
                    totals[sigma] += float(loss) / counts[sigma]
        self.transformer.train()
        return totals

    def _eval_losses(self, view: CropView, prompt: PromptEmbeds, sigmas: tuple[float, ...]) -> Tensor:
        """One picture's loss at each sigma, [number of sigmas]. prompt: of its caption."""
        base, moments = self.context.base, self.moments[view]
        latents = mean_latents(moments[None], self.scale)  # [1, C, h, w]
        noised = []
        for sigma in sigmas:
            generator = torch.Generator().manual_seed(derive(0, "eval", view.picture.name, str(sigma)))
            at = torch.tensor([sigma])
            noised.append(flow_matching.add_noise(latents, at, at, generator, self.family.pack))
        batch = _map_tensors(flow_matching.collate(noised), lambda tensor: to_device(tensor, base.device))
        prompts = PromptEmbeds(prompt.txt.expand(len(sigmas), -1, -1), prompt.vec.expand(len(sigmas), -1))
        with torch.no_grad(), autocast(base.device, base.dtype):
            prediction = self.predict(batch, prompts, *moments.shape[-2:])  # [sigmas, N, D]
        return (prediction.float() - batch.target).square().flatten(1).mean(1)


def _read_moments(context: RunContext) -> dict[CropView, Tensor]:
    """Each view's latent moments [2*C, h, w] from the cache; equal pixels share one tensor."""
    moments = context.cache.read("latents", context.latent_keys.values(), lambda: encode_latents(context))
    return {view: moments[key] for view, key in context.latent_keys.items()}


def _map_tensors(batch: flow_matching.NoisyBatch, change: Callable[[Tensor], Tensor]) -> flow_matching.NoisyBatch:
    return flow_matching.NoisyBatch(
        *(change(tensor) for tensor in (batch.img, batch.target, batch.sigmas, batch.timesteps))
    )
